package kvstore

import (
	"encoding/hex"
	"strings"
)

// encodedPrefix marks a segment that is written in hex. No plain segment begins with it.
const encodedPrefix = "x_"

// encodeName makes a key of a record's name, segment by segment. Different names give different keys, also on
// storages that ignore case, and no key leaves its folder.
func encodeName(name string) string {
	segments := strings.Split(name, "/")
	for i, s := range segments {
		if !isPlain(s) {
			segments[i] = encodedPrefix + hex.EncodeToString([]byte(s))
		}
	}
	return strings.Join(segments, "/")
}

// decodeSegment undoes encodeName for one segment; false if it is none of its results.
func decodeSegment(s string) (string, bool) {
	if isPlain(s) {
		return s, true
	}
	coded, ok := strings.CutPrefix(s, encodedPrefix)
	if !ok {
		return "", false
	}
	b, err := hex.DecodeString(coded)
	if err != nil || isPlain(string(b)) || coded != strings.ToLower(coded) {
		return "", false
	}
	return string(b), true
}

// isPlain tells segments that every storage keeps apart as they are: lower-case letters, digits, "-" and "_".
func isPlain(s string) bool {
	if s == "" || strings.HasPrefix(s, encodedPrefix) {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_') {
			return false
		}
	}
	return true
}
