// Package browser has a real browser, Chromium, go through the gateway's pages as people do: the pages of
// wechat_authorize, the logins of wechat_oauth, web pages that fetch a signature from wechat_jssdk, and the page of wechat_console; all over TLS,
// against the built program and the simulator. It is a module of its own, so that what drives the browser stays out of
// the gateway's module graph. The tests are all there is.
//
// With the environment variable WECHAT_SCREENSHOTS they leave a picture of each page in that folder.
package browser
