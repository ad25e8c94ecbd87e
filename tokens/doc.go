// Package tokens keeps what WeChat hands out: component_verify_tickets, component tokens, authorizer tokens with
// their refresh tokens, and the tokens of plain accounts.
//
// # States
//
// A token is fresh, stale or invalid. A fresh one is returned from memory. A stale one, near its end, is returned
// too, and renewed once in the background. When it is invalid (expired, refused by WeChat, or never fetched) all
// callers wait for one renewal, each with its own deadline; none of them can cancel it for the others.
//
// # Durable before used
//
// Every token lives in a record of a Store. A renewal runs under a lock that all nodes share, looks at the record
// again, calls WeChat, writes the record, and only then publishes the token to this node's read cache. A record
// carries a generation: an older one never replaces a newer one, neither in the store nor in the cache. The cache
// may lose an entry at any time; it is then read again from the store. When a store cannot be written the renewed
// record stays in memory, serves from there, and is written as soon as the store lets it.
//
// # Sharing
//
// A Manager outlives configurations: Use swaps its Environment (credentials, store, client, log) atomically, and
// each operation reads the current one once. Between nodes only the Store is shared.
package tokens
