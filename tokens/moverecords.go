package tokens

import (
	"context"
	"encoding/hex"
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Which records there are, for who moves all of them. What is set aside below wechat/v1/aside is not among them: no
// gateway reads it.

// recordClass is what is in a record, as a report names it.
type recordClass string

const (
	classTicket     recordClass = "tickets"
	classComponent  recordClass = "platforms"
	classAuthorizer recordClass = "authorizers"
	classAccount    recordClass = "accounts"
	classJSTicket   recordClass = "JS tickets"
	classIntent     recordClass = "accepted authorizations"
	classForward    recordClass = "events to forward"
	classOpaque     recordClass = "keys of opaque tokens"
	classVerify     recordClass = "verification files"
	classConfirm    recordClass = "WeChat's verification files"
	classUserName   recordClass = "gh_ ids"
	classPushAsked  recordClass = "requests for tickets"
	classRoster     recordClass = "lists of authorizers"
)

// classOf is the class of the record of a name; false if none of ours has it.
func classOf(name string) (recordClass, bool) {
	folder, base := path.Split(name)
	id := idOf(base)
	switch _, isTicket := ticketPlatform(name); {
	case isTicket:
		return classTicket, true
	case name == opaqueName:
		return classOpaque, true
	case name == intentName(base) && isCodeHash(base):
		return classIntent, true
	case name == forwardName(base) && isCodeHash(base):
		return classForward, true
	case strings.HasPrefix(name, verifyFolder+"/"):
		shard, err := hex.DecodeString(base)
		return classVerify, err == nil && len(shard) == 1 && int(shard[0]) < verifyShards && name == verifyShardName(int(shard[0]))
	case name == confirmName(ComponentKey(id)):
		return classConfirm, true
	case strings.HasPrefix(name, path.Join(root, "verify", string(KindAuthorizer))+"/"):
		platform := idOf(path.Base(path.Dir(path.Clean(path.Dir(name)))))
		return classConfirm, name == confirmName(AuthorizerKey(platform, id))
	case strings.HasPrefix(folder, userNameFolder+"/"):
		return classUserName, name == userNameName(id)
	case name == rosterName(id):
		return classRoster, true
	case name == pushAskedName(id):
		return classPushAsked, true
	}
	k, ok := keyOf(name)
	switch {
	case !ok:
		return "", false
	case k.Kind == KindComponent:
		return classComponent, true
	case k.Kind == KindAuthorizer:
		return classAuthorizer, true
	case k.Kind == KindAccount:
		return classAccount, true
	default:
		return classJSTicket, true
	}
}

// shardCount is the number of folders that records are spread over below one.
const shardCount = 256

// shards are these folders.
func shards(folder string) []string {
	list := make([]string, shardCount)
	for i := range list {
		list[i] = path.Join(folder, hex.EncodeToString([]byte{byte(i)}))
	}
	return list
}

// recordFolders are the folders with all records of a store, in the order in which they are to be written elsewhere. The
// lists come last: where none is yet, the gateways read it at once, and would find what is on its way.
func recordFolders(platforms []string) (folders []string) {
	folders = []string{
		path.Dir(opaqueName), path.Join(root, "ticket"), path.Join(root, string(KindComponent)), path.Join(root, string(KindAccount)),
	}
	for _, p := range platforms {
		folders = append(folders, shards(path.Join(root, string(KindAuthorizer), recordID(p)))...)
	}
	// An account's record says whether a code was exchanged, so accepted authorizations come after it.
	folders = append(folders, intentFolder, forwardFolder, verifyFolder, path.Join(root, "verify", string(KindComponent)), path.Join(root, "push"))
	folders = append(folders, shards(userNameFolder)...)
	for _, kind := range []Kind{KindJSAPI, KindCard} {
		folders = append(folders, shards(path.Join(root, string(kind), "account"))...)
		for _, p := range platforms {
			folders = append(folders, shards(path.Join(root, string(kind), recordID(p)))...)
		}
	}
	for _, p := range platforms {
		folders = append(folders, shards(path.Join(root, "verify", string(KindAuthorizer), recordID(p)))...)
	}
	return append(folders, path.Join(root, "roster"))
}

// storedPlatforms are the platforms that have records in a store, and those that are configured.
func storedPlatforms(ctx context.Context, env *Environment) (platforms []string, err error) {
	for i := range env.Platforms {
		platforms = append(platforms, env.Platforms[i].AppID)
	}
	// Of a platform without any of these nothing works; a store that lists folders names those of its authorizers too.
	for _, folder := range []string{"ticket", "roster", "push", string(KindComponent), string(KindAuthorizer)} {
		names, err := env.Store.List(ctx, path.Join(root, folder))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, name := range names {
			if id := idOf(path.Base(name)); id != "" && recordID(id) == path.Base(name) {
				platforms = append(platforms, id)
			}
		}
	}
	slices.Sort(platforms)
	return slices.Compact(platforms), nil
}
