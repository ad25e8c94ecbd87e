'use strict';

// Does for one process what a hosts file and port 443 do for a machine: api.weixin.qq.com is the gateway. Names and
// certificates are checked as ever. What the gateway sends is written to a file, for the test to look through.
const fs = require('fs');
const tls = require('tls');

const connect = tls.connect;
tls.connect = function (options, ...rest) {
  if (options.host !== 'api.weixin.qq.com') {
    throw new Error('a call to ' + options.host);
  }
  const socket = connect.call(this, {
    ...options, host: '127.0.0.1', port: process.env.hostsPort, servername: 'api.weixin.qq.com',
  }, ...rest);
  socket.on('data', (data) => fs.appendFileSync(process.env.tap, data));
  return socket;
};
