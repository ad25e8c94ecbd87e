// Package tokens keeps what WeChat hands out: component_verify_tickets, component tokens, authorizer tokens with
// their refresh tokens, the tokens of plain accounts, and the jsapi and card tickets that are fetched with them.
//
// # States
//
// Each credential is fresh, stale or invalid. A fresh one is returned from memory. A stale one, near its end, is returned
// too, and renewed once in the background, at a moment that differs from key to key. When it is invalid (expired, refused
// by WeChat, or never fetched) all callers wait for one renewal, each with its own deadline; none of them can cancel it
// for the others. A renewal that fails is tried again after a growing pause of the key's own; the old token serves as
// long as it lives, and the log hears of it once and then rarely.
//
// # Durable before used
//
// Every token lives in a record of a Store. A renewal runs under a lock that all nodes share, looks at the record
// again, calls WeChat, writes the record, and only then publishes the token to this node's read cache. A record
// carries a generation: an older one never replaces a newer one, neither in the store nor in the cache. The cache
// may lose an entry at any time; it is then read again from the store. When a store cannot be written the renewed
// record goes to the spill folder of the node, serves from memory, and is written as soon as the store lets it.
//
// An authorization code that WeChat pushed is an intent in the store before the push is acknowledged, and stays one until
// its tokens are, or until WeChat was asked for what it stood for.
//
// # Healing
//
// What the store has lost, or holds wrong, WeChat still knows. A void refresh token is replaced by the current one in the
// renewal that found out; a missing account is asked for by whoever needs it; and the roster, WeChat's list of a
// platform's authorizers, is compared with the store when that is new or was emptied, when there is a doubt, and once a
// day. Nothing is deleted on the strength of the list alone. A damaged record is moved aside.
//
// # Sharing
//
// A Manager outlives configurations: Use swaps its Environment (credentials, store, client, log) atomically, and
// each operation reads the current one once. Between nodes only the Store is shared.
package tokens
