'use strict';

const { promisify } = require('util');
const API = require('wechat-api');
const { gateway, appid, clientKey, openid, text, menu, picture, pageURL, templateID } = process.env;

(async () => {
  const api = new API(appid, clientKey);
  if (gateway) {
    api.endpoint = gateway;
  }

  const call = (name, ...args) => promisify(api[name]).call(api, ...args);
  const token = (await call('getLatestToken')).accessToken;
  const user = await call('getUser', openid);
  const template = await call('sendTemplate', openid, templateID, '', { first: { value: '<first> & 二' } });
  await call('sendText', openid, text);
  await call('createMenu', { button: [{ type: 'click', name: menu, key: 'V1001' }] });
  const code = await call('createTmpQRCode', 'scene', 60);
  const media = await call('uploadMedia', picture, 'image');
  const file = await call('getMedia', media.media_id);
  const config = await call('getJsConfig', { url: pageURL, jsApiList: [] });
  console.log(JSON.stringify({
    token, openid: user.openid, template: template.msgid, qrcode: code.ticket, media: file.toString('base64'),
    nonce: config.nonceStr, timestamp: config.timestamp, signature: config.signature,
  }));
})().catch((err) => {
  console.error(err);
  process.exit(1);
});
