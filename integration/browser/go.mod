module github.com/caddy-wechat/caddy-wechat/integration/browser

go 1.26.0

replace github.com/caddy-wechat/caddy-wechat => ../..

require (
	github.com/caddy-wechat/caddy-wechat v0.0.0-00010101000000-000000000000
	github.com/chromedp/cdproto v0.159.0
	github.com/chromedp/chromedp v0.22.1
	github.com/makiuchi-d/gozxing v0.1.1
)

require (
	github.com/go-json-experiment/json v0.0.0-20260213210345-44df1a37e875 // indirect
	golang.org/x/text v0.42.0 // indirect
	golang.org/x/xerrors v0.0.0-20200804184101-5ec99f83aff1 // indirect
)
