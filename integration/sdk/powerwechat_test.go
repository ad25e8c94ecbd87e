package sdk_test

import (
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/ArtisanCloud/PowerLibs/v3/cache"
	"github.com/ArtisanCloud/PowerLibs/v3/object"
	"github.com/ArtisanCloud/PowerWeChat/v3/src/kernel/power"
	"github.com/ArtisanCloud/PowerWeChat/v3/src/officialAccount"
	menuRequest "github.com/ArtisanCloud/PowerWeChat/v3/src/officialAccount/menu/request"
	templateRequest "github.com/ArtisanCloud/PowerWeChat/v3/src/officialAccount/templateMessage/request"
)

// toGateway is a gateway's base URL; as a transport it takes there what is meant for WeChat's API.
type toGateway string

func (gateway toGateway) RoundTrip(r *http.Request) (*http.Response, error) {
	base, err := url.Parse(string(gateway))
	if err == nil && r.URL.Host == "api.weixin.qq.com" {
		r = r.Clone(r.Context())
		r.URL.Scheme, r.URL.Host = base.Scheme, base.Host
	}
	return http.DefaultTransport.RoundTrip(r)
}

func powerWeChat(t *testing.T, job task) outcome {
	gateway, appID, clientKey := job.gateway, job.appID, job.clientKey
	ctx := t.Context()
	config := &officialAccount.UserConfig{AppID: appID, Secret: clientKey}
	config.StableTokenMode = job.stable
	if gateway != "" {
		config.Http.Transport = toGateway(gateway)
	} else {
		config.Http.Transport = job.hosts
	}
	dir := t.TempDir()
	config.Log = officialAccount.Log{File: filepath.Join(dir, "info.log"), Error: filepath.Join(dir, "error.log")}
	cache.ACCache = nil // it is one for the whole process, with a copy in the home folder, unless made anew
	config.Cache = cache.NewMemCache("", 0, dir)
	app, err := officialAccount.NewOfficialAccount(config)
	if err != nil {
		t.Fatal(err)
	}

	var done outcome
	token, err := app.AccessToken.GetToken(ctx, false)
	if err != nil {
		t.Fatal(err)
	}
	done.Token = token.AccessToken
	info, err := app.User.Get(ctx, job.openID, "zh_CN")
	if err != nil {
		t.Fatal(err)
	}
	done.OpenID = info.OpenID
	sent, err := app.TemplateMessage.Send(ctx, &templateRequest.RequestTemlateMessage{
		ToUser: job.openID, TemplateID: templateID,
		Data: &power.HashMap{"first": &power.HashMap{"value": "<first> & 二"}},
	})
	if err != nil || sent.ErrCode != 0 {
		t.Fatalf("%+v %v", sent, err)
	}
	done.Template = int64(sent.MsgID)
	text, err := app.CustomerService.Send(ctx, &object.HashMap{
		"touser": job.openID, "msgtype": "text", "text": &object.HashMap{"content": job.text},
	})
	if err != nil || text.ErrCode != 0 {
		t.Fatalf("%+v %v", text, err)
	}
	menu, err := app.Menu.Create(ctx, []*menuRequest.Button{{Type: "click", Name: job.menu, Key: "V1001"}})
	if err != nil || menu.ErrCode != 0 {
		t.Fatalf("%+v %v", menu, err)
	}
	code, err := app.QRCode.Temporary(ctx, "scene", 60)
	if err != nil {
		t.Fatal(err)
	}
	done.QRCode = code.Ticket
	media, err := app.Media.UploadImage(ctx, job.picture)
	if err != nil || media.ErrCode != 0 {
		t.Fatalf("%+v %v", media, err)
	}
	file, err := app.Media.Get(ctx, media.MediaID)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Body.Close() }()
	if done.Media, err = io.ReadAll(file.Body); err != nil {
		t.Fatal(err)
	}
	const nonce, timestamp = "nonce", 1700000000
	signed, err := app.JSSDK.ConfigSignature(ctx, pageURL, nonce, timestamp)
	if err != nil {
		t.Fatal(err)
	}
	done.Nonce, done.Timestamp = nonce, strconv.Itoa(timestamp)
	done.Signature, _ = (*signed)["signature"].(string)
	return done
}
