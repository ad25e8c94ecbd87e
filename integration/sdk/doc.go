// Package sdk runs the WeChat SDKs of others against a gateway process, each as its users would: with a base URL and a
// secret changed, or with nothing but the secret where the gateway stands in for api.weixin.qq.com over TLS. It is a module
// of its own, so that what the SDKs depend on stays out of the gateway's module graph. The tests are all there is.
package sdk
