package crypto

import (
	"crypto/sha1" //nolint:gosec // WeChat's protocol
	"encoding/hex"
	"slices"
	"strconv"
	"strings"
)

// JSSDKSignature signs a page for WeChat's JS-SDK (wx.config): the lower-case hex SHA-1 over ticket, nonce, timestamp
// (Unix seconds) and the page's URL. The URL keeps its query and loses its fragment, which browsers do not send.
func JSSDKSignature(ticket, nonce string, timestamp int64, pageURL string) string {
	pageURL, _, _ = strings.Cut(pageURL, "#")
	text := "jsapi_ticket=" + ticket + "&noncestr=" + nonce +
		"&timestamp=" + strconv.FormatInt(timestamp, 10) + "&url=" + pageURL
	sum := sha1.Sum([]byte(text)) //nolint:gosec // WeChat's protocol
	return hex.EncodeToString(sum[:])
}

// CardSignature signs for WeChat's card and coupon (卡券) calls: the lower-case hex SHA-1 of all values, the api ticket
// among them, sorted byte-wise and joined without separator.
func CardSignature(values ...string) string {
	sum := sha1.Sum([]byte(strings.Join(slices.Sorted(slices.Values(values)), ""))) //nolint:gosec // WeChat's protocol
	return hex.EncodeToString(sum[:])
}
