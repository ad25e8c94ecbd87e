'use strict';

const { OfficialAccount } = require('node-easywechat');
const { gateway, stable, appid, clientKey, openid, text, menu, picture, pageURL, templateID } = process.env;

(async () => {
  const config = { app_id: appid, secret: clientKey };
  if (gateway) {
    config.http = { baseURL: gateway + '/' };
  }
  config.use_stable_access_token = Boolean(stable);
  const app = new OfficialAccount(config);

  const token = await app.getAccessToken().getToken();
  const client = app.getClient();
  const ok = (response) => {
    const answer = response.toObject();
    if (answer.errcode) {
      throw new Error(JSON.stringify(answer));
    }
    return answer;
  };
  const user = ok(await client.get('/cgi-bin/user/info', { params: { openid } }));
  const template = ok(await client.postJson('/cgi-bin/message/template/send', {
    touser: openid, template_id: templateID, data: { first: { value: '<first> & 二' } },
  }));
  ok(await client.postJson('/cgi-bin/message/custom/send', { touser: openid, msgtype: 'text', text: { content: text } }));
  ok(await client.postJson('/cgi-bin/menu/create', { button: [{ type: 'click', name: menu, key: 'V1001' }] }));
  const code = ok(await client.postJson('/cgi-bin/qrcode/create', {
    expire_seconds: 60, action_name: 'QR_STR_SCENE', action_info: { scene: { scene_str: 'scene' } },
  }));
  const media = ok(await client.withFile(picture, 'media').post('/cgi-bin/media/upload', { params: { type: 'image' } }));
  const file = await client.get('/cgi-bin/media/get', { params: { media_id: media.media_id }, responseType: 'arraybuffer' });
  const signed = await app.getUtils().buildJsSdkConfig(pageURL);
  console.log(JSON.stringify({
    token, openid: user.openid, template: template.msgid, qrcode: code.ticket, media: file.getContent().toString('base64'),
    nonce: signed.nonceStr, timestamp: String(signed.timestamp), signature: signed.signature,
  }));
})().catch((err) => {
  console.error(err);
  process.exit(1);
});
