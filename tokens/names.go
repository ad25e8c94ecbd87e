package tokens

import (
	"crypto/sha256"
	"encoding/hex"
	"path"
	"strconv"
	"strings"
	"time"
)

// Record names. One place makes them, so that no text from outside can name another record.
const (
	root           = "wechat/v1"
	intentFolder   = root + "/intent"
	forwardFolder  = root + "/forward"
	userNameFolder = root + "/username"
	// These tell the locks of a whole renewal and a whole exchange from the short one of a write to the record.
	renewalLock  = "/renewal"
	exchangeLock = "/exchange"
)

// maxID bounds an appid. WeChat's have 18 characters.
const maxID = 64

// recordName is where a token's record is kept. Authorizers are spread over 256 folders per platform.
func (k Key) recordName() string {
	switch k.Kind {
	case KindAuthorizer:
		sum := sha256.Sum256([]byte(k.AppID))
		return path.Join(root, string(KindAuthorizer), recordID(k.Platform), hex.EncodeToString(sum[:1]), recordID(k.AppID))
	case KindComponent:
		return path.Join(root, string(KindComponent), recordID(k.Platform))
	case KindJSAPI, KindCard:
		sum := sha256.Sum256([]byte(k.AppID))
		holder := "account" // no platform has this for its appid
		if k.Platform != "" {
			holder = recordID(k.Platform)
		}
		return path.Join(root, string(k.Kind), holder, hex.EncodeToString(sum[:1]), recordID(k.AppID))
	default:
		return path.Join(root, recordID(string(k.Kind)), recordID(k.AppID))
	}
}

// keyOf is the key whose record has a name; false if none has.
func keyOf(name string) (k Key, ok bool) {
	below, ok := strings.CutPrefix(name, root+"/")
	if !ok {
		return Key{}, false
	}
	parts := strings.Split(below, "/")
	for i := range parts {
		if i > 0 {
			parts[i] = idOf(parts[i])
		}
	}
	k = Key{Kind: Kind(parts[0])}
	switch {
	case k.Kind == KindComponent && len(parts) == 2:
		k.Platform = parts[1]
	case k.Kind == KindAccount && len(parts) == 2:
		k.AppID = parts[1]
	case (k.Kind == KindAuthorizer || k.isJSTicket()) && len(parts) == 4:
		k.Platform, k.AppID = parts[1], parts[3]
		if k.isJSTicket() && k.Platform == "account" {
			k.Platform = ""
		}
	}
	return k, k.recordName() == name
}

// ticketPlatform is the platform whose ticket is kept under a name; false if none is.
func ticketPlatform(name string) (platform string, ok bool) {
	platform = idOf(path.Base(name))
	return platform, ticketName(platform) == name
}

// ticketName is where a platform's ticket is kept.
func ticketName(platform string) string { return path.Join(root, "ticket", recordID(platform)) }

// intentName is where the intent to exchange a code is kept. The code is a secret and case-sensitive; its hash is
// neither.
func intentName(codeHash string) string { return path.Join(intentFolder, codeHash) }

// forwardName is where an event is kept until it is handed on.
func forwardName(id string) string { return path.Join(forwardFolder, id) }

// codeHash names an authorization code of a platform, in lower-case hex.
func codeHash(platform, code string) string {
	sum := sha256.Sum256([]byte(platform + "\x00" + code))
	return hex.EncodeToString(sum[:16])
}

// userNameName is where it is kept which account a gh_ id belongs to, spread like the authorizers.
func userNameName(userName string) string {
	sum := sha256.Sum256([]byte(userName))
	return path.Join(userNameFolder, hex.EncodeToString(sum[:1]), recordID(userName))
}

// rosterName is where it is kept how far a platform's list of authorizers was read.
func rosterName(platform string) string { return path.Join(root, "roster", recordID(platform)) }

// doubtName is where it is kept when the store last came to lack a record of a platform's that WeChat's list tells of.
func doubtName(platform string) string { return path.Join(root, "doubt", recordID(platform)) }

// confirmName is where the verification file of a web-view domain is kept: a platform's, or that of an account.
func confirmName(k Key) string {
	folder := path.Join(root, "verify", string(k.Kind))
	if k.Kind == KindComponent {
		return path.Join(folder, recordID(k.Platform))
	}
	sum := sha256.Sum256([]byte(k.AppID))
	return path.Join(folder, recordID(k.Platform), hex.EncodeToString(sum[:1]), recordID(k.AppID))
}

// confirmKey is the key whose confirm file is kept under a name; false if none is.
func confirmKey(name string) (k Key, ok bool) {
	below, ok := strings.CutPrefix(name, root+"/verify/")
	if !ok {
		return Key{}, false
	}
	switch parts := strings.Split(below, "/"); {
	case parts[0] == string(KindComponent) && len(parts) == 2:
		k = ComponentKey(idOf(parts[1]))
	case parts[0] == string(KindAuthorizer) && len(parts) == 4:
		k = AuthorizerKey(idOf(parts[1]), idOf(parts[3]))
	default:
		return Key{}, false
	}
	return k, confirmName(k) == name
}

// pushAskedName is where it is kept when WeChat was last asked to push a platform's ticket.
func pushAskedName(platform string) string { return path.Join(root, "push", recordID(platform)) }

// asideName is where a record goes that cannot be read: below its own name, so that it can be opened by hand.
func asideName(name string, at time.Time) string {
	return path.Join(root, "aside", strings.TrimPrefix(name, root+"/"), "at-"+strconv.FormatInt(at.UnixNano(), 10))
}

// isCodeHash tells a record in the folders of intents and of events from stray files, such as a store's temporary ones.
func isCodeHash(name string) bool {
	b, err := hex.DecodeString(name)
	return err == nil && len(b) == 16
}

// idOf undoes recordID for the ids that can be had back. For others it gives one whose recordID is another.
func idOf(segment string) string {
	if coded, ok := strings.CutPrefix(segment, "x-"); ok {
		id, _ := hex.DecodeString(coded)
		return string(id)
	}
	return segment
}

// recordID makes one path segment of an id. An appid stays readable; anything with characters that a store may not
// tell apart, or that mean something in a path, is written in hex behind a prefix that no plain id has.
func recordID(id string) string {
	plain := id != "" && len(id) <= maxID
	for i := 0; i < len(id) && plain; i++ {
		c := id[i]
		plain = 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
	}
	if plain {
		return id
	}
	if len(id) > maxID {
		sum := sha256.Sum256([]byte(id))
		return "h-" + hex.EncodeToString(sum[:])
	}
	return "x-" + hex.EncodeToString([]byte(id))
}
