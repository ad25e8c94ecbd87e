'use strict';

const API = require('co-wechat-api');
const { gateway, appid, clientKey, openid, text, menu, picture, pageURL, templateID } = process.env;

(async () => {
  const api = new API(appid, clientKey);
  if (gateway) {
    api.prefix = gateway + '/cgi-bin/';
  }

  const token = (await api.ensureAccessToken()).accessToken;
  const user = await api.getUser(openid);
  const template = await api.sendTemplate(openid, templateID, '', '', { first: { value: '<first> & 二' } });
  await api.sendText(openid, text);
  await api.createMenu({ button: [{ type: 'click', name: menu, key: 'V1001' }] });
  const code = await api.createTmpQRCode('scene', 60);
  const media = await api.uploadImageMedia(picture);
  const file = await api.getMedia(media.media_id);
  const config = await api.getJsConfig({ url: pageURL, jsApiList: [] });
  console.log(JSON.stringify({
    token, openid: user.openid, template: template.msgid, qrcode: code.ticket, media: file.toString('base64'),
    nonce: config.nonceStr, timestamp: config.timestamp, signature: config.signature,
  }));
})().catch((err) => {
  console.error(err);
  process.exit(1);
});
