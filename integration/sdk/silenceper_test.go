package sdk_test

import (
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	wechat "github.com/silenceper/wechat/v2"
	"github.com/silenceper/wechat/v2/cache"
	miniConfig "github.com/silenceper/wechat/v2/miniprogram/config"
	"github.com/silenceper/wechat/v2/miniprogram/qrcode"
	"github.com/silenceper/wechat/v2/officialaccount/basic"
	offConfig "github.com/silenceper/wechat/v2/officialaccount/config"
	"github.com/silenceper/wechat/v2/officialaccount/material"
	"github.com/silenceper/wechat/v2/officialaccount/menu"
	"github.com/silenceper/wechat/v2/officialaccount/message"
	"github.com/silenceper/wechat/v2/util"
)

func silenceper(t *testing.T, job task) outcome {
	gateway, appID, clientKey := job.gateway, job.appID, job.clientKey
	wc := wechat.NewWechat()
	defer wc.SetHTTPClient(util.DefaultHTTPClient)
	defer util.SetURIModifier(nil)
	if gateway != "" {
		util.SetURIModifier(func(uri string) string { return strings.Replace(uri, "https://api.weixin.qq.com", gateway, 1) })
	} else {
		wc.SetHTTPClient(&http.Client{Transport: job.hosts})
	}
	config := &offConfig.Config{AppID: appID, AppSecret: clientKey, Cache: cache.NewMemory()}
	config.UseStableAK = job.stable
	oa := wc.GetOfficialAccount(config)

	var done outcome
	var err error
	if done.Token, err = oa.GetAccessToken(); err != nil {
		t.Fatal(err)
	}
	info, err := oa.GetUser().GetUserInfo(job.openID)
	if err != nil {
		t.Fatal(err)
	}
	done.OpenID = info.OpenID
	done.Template, err = oa.GetTemplate().Send(&message.TemplateMessage{
		ToUser: job.openID, TemplateID: templateID,
		Data: map[string]*message.TemplateDataItem{"first": {Value: "<first> & 二"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := oa.GetCustomerMessageManager().Send(message.NewCustomerTextMessage(job.openID, job.text)); err != nil {
		t.Fatal(err)
	}
	if err := oa.GetMenu().SetMenu([]*menu.Button{menu.NewClickButton(job.menu, "V1001")}); err != nil {
		t.Fatal(err)
	}
	ticket, err := oa.GetBasic().GetQRTicket(basic.NewTmpQrRequest(time.Minute, "scene"))
	if err != nil {
		t.Fatal(err)
	}
	done.QRCode = ticket.Ticket
	media, err := oa.GetMaterial().MediaUpload(material.MediaTypeImage, job.picture)
	if err != nil {
		t.Fatal(err)
	}
	// This SDK leaves the download to the app, and gives it the address.
	address, err := oa.GetMaterial().GetMediaURL(media.MediaID)
	if err != nil {
		t.Fatal(err)
	}
	if done.Media, err = util.HTTPGet(address); err != nil {
		t.Fatal(err)
	}
	page, err := oa.GetJs().GetConfig(pageURL)
	if err != nil {
		t.Fatal(err)
	}
	done.Nonce, done.Timestamp, done.Signature = page.NonceStr, strconv.FormatInt(page.Timestamp, 10), page.Signature

	// The URI modifier is not asked about mini-program codes; a transport takes these too.
	if gateway != "" {
		util.SetURIModifier(nil)
		wc.SetHTTPClient(&http.Client{Transport: toGateway(gateway)})
	}
	mini := wc.GetMiniProgram(&miniConfig.Config{AppID: appID, AppSecret: clientKey, Cache: cache.NewMemory()})
	if image, err := mini.GetQRCode().GetWXACodeUnlimit(qrcode.QRCoder{Scene: "a=1"}); err != nil || len(image) < 8<<10 {
		t.Errorf("%d bytes of a mini-program code: %v", len(image), err)
	}
	return done
}
