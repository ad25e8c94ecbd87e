// Package crypto is WeChat's push protocol on bytes: signatures, encryption, envelopes, and the sealing of what
// the gateway keeps at rest. It does no input or output, keeps no global state and logs nothing.
//
// # The protocol in one page
//
// WeChat pushes a message or event as an HTTP POST. In safe mode (安全模式) the query carries timestamp, nonce and
// msg_signature, and the body is an envelope, XML or JSON:
//
//	<xml><ToUserName>gh_…</ToUserName><Encrypt>base64</Encrypt></xml>     a message or event of an account
//	<xml><AppId>wx…</AppId><Encrypt>base64</Encrypt></xml>                an event of a third-party platform
//	{"ToUserName":"gh_…","Encrypt":"base64"}
//
// msg_signature is the lower-case hex SHA-1 of token, timestamp, nonce and the base64 text as received, sorted
// byte-wise and joined without separator. The plain signature (URL handshake, plaintext mode) is the same over the first
// three; it covers no body. Decoded, Encrypt is AES-256-CBC whose key is the base64 of the 43-character EncodingAESKey
// and whose IV is that key's first 16 bytes. The plaintext is
//
//	16 random bytes | length of msg, 4 bytes big-endian | msg | receive id | padding
//
// with PKCS#7 padding to multiples of 32, so 1 to 32 bytes. The receive id is the account's appid or, for everything
// pushed to a third-party platform, messages of its authorizers included, the platform's appid. A reply is encrypted
// in the same way, with the key that opened the push, in an envelope of Encrypt, MsgSignature, TimeStamp and Nonce.
//
// While a token or key is being rotated both are live at the same time: [Codec] holds them newest first and tries
// all. Opening goes in the order signature, base64, cipher, padding, length, receive id.
//
// # Threat notes
//
//   - The signature is checked first, so nobody without the token learns anything from what follows; the errors after
//     it are undifferentiated all the same. All tokens are tried whatever fits, and compared in constant time.
//   - SHA-1 and CBC with a fixed IV are WeChat's choice. SHA-1 stands here as a MAC of a joined text and not for
//     collision resistance. The package cannot serve under GODEBUG=fips140=only, which forbids SHA-1.
//   - The joined text has no separators, so one signature fits several splits of the same bytes: timestamp and nonce
//     may be swapped, or cut elsewhere. [Fresh] therefore demands a timestamp of exactly ten digits, and Open limits
//     the length of both. A captured push can still become fresh once more at the second that its nonce spells; what
//     keeps it from running twice is the caller's identity check on the opened message.
//   - The plain signature proves nothing about the body it comes with.
//   - Envelopes are read by a strict scanner: one root, known fields once, no DOCTYPE, no entities but the predefined,
//     no attributes, end of input required. Two parsers cannot be made to see two different messages. Control characters
//     that XML forbids are let pass in CDATA, but not in the fields that we act on: WeChat passes on what a user has
//     typed, and a parser that is stricter than ours sees no message at all.
//   - Records at rest are bound to their name and cannot be moved from one place of the store to another.
package crypto
