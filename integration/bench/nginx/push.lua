-- A push as the gateway's wechat_message handles it, as far as one would write it by hand: signature, timestamp, AES, the
-- plaintext to the backend, and the answer encrypted. Not in it: what the gateway does for messages that come again, key
-- changes, several accounts, metrics, and what is wrong with a backend's answer.
local ffi = require "ffi"

ffi.cdef [[
typedef struct evp_cipher_ctx_st EVP_CIPHER_CTX;
typedef struct evp_cipher_st EVP_CIPHER;
EVP_CIPHER_CTX *EVP_CIPHER_CTX_new(void);
const EVP_CIPHER *EVP_aes_256_cbc(void);
int EVP_CipherInit_ex(EVP_CIPHER_CTX *ctx, const EVP_CIPHER *type, void *engine, const unsigned char *key, const unsigned char *iv, int enc);
int EVP_CIPHER_CTX_set_padding(EVP_CIPHER_CTX *ctx, int pad);
int EVP_CipherUpdate(EVP_CIPHER_CTX *ctx, unsigned char *out, int *outl, const unsigned char *in, int inl);
int RAND_bytes(unsigned char *buf, int num);
]]
local crypto = ffi.load("libcrypto.so.3")

local byte, char, find, format, rep, sub = string.byte, string.char, string.find, string.format, string.rep, string.sub
local band, bor, lshift, rshift = bit.band, bit.bor, bit.lshift, bit.rshift
local window, block, random = 300, 32, 16

local function hex(s)
	return (s:gsub(".", function(c) return format("%02x", byte(c)) end))
end

return function(appid, token, aes_key)
	local key = ngx.decode_base64(aes_key .. "=")
	local iv = sub(key, 1, 16)
	local opener, sealer = crypto.EVP_CIPHER_CTX_new(), crypto.EVP_CIPHER_CTX_new()
	crypto.EVP_CipherInit_ex(opener, crypto.EVP_aes_256_cbc(), nil, key, iv, 0)
	crypto.EVP_CipherInit_ex(sealer, crypto.EVP_aes_256_cbc(), nil, key, iv, 1)
	local size = 64 * 1024
	local buffer, written, salt = ffi.new("unsigned char[?]", size), ffi.new("int[1]"), ffi.new("unsigned char[?]", random)

	local function run(ctx, text)
		local out = buffer
		if #text > size then
			out = ffi.new("unsigned char[?]", #text)
		end
		crypto.EVP_CipherInit_ex(ctx, nil, nil, nil, iv, -1)
		crypto.EVP_CIPHER_CTX_set_padding(ctx, 0)
		if crypto.EVP_CipherUpdate(ctx, out, written, text, #text) ~= 1 then
			return nil
		end
		return ffi.string(out, written[0])
	end

	local function sign(timestamp, nonce, encrypted)
		local parts = { token, timestamp, nonce, encrypted }
		table.sort(parts)
		return hex(ngx.sha1_bin(table.concat(parts)))
	end

	local function open(encrypted)
		local sealed = ngx.decode_base64(encrypted)
		if not sealed or #sealed == 0 or #sealed % 16 ~= 0 then
			return nil
		end
		local text = run(opener, sealed)
		local pad = byte(text, #text)
		if pad < 1 or pad > block or #text < random + 4 + pad then
			return nil
		end
		local a, b, c, d = byte(text, random + 1, random + 4)
		local length = bor(lshift(a, 24), lshift(b, 16), lshift(c, 8), d)
		local from = random + 4
		if length < 0 or sub(text, from + length + 1, #text - pad) ~= appid then
			return nil
		end
		return sub(text, from + 1, from + length)
	end

	local function seal(text)
		crypto.RAND_bytes(salt, random)
		local n = #text
		local whole = ffi.string(salt, random) ..
			char(band(rshift(n, 24), 255), band(rshift(n, 16), 255), band(rshift(n, 8), 255), band(n, 255)) .. text .. appid
		local pad = block - #whole % block
		return ngx.encode_base64(run(sealer, whole .. rep(char(pad), pad)))
	end

	return function()
		local args = ngx.req.get_uri_args()
		local timestamp, nonce = args.timestamp, args.nonce
		ngx.req.read_body()
		local body = ngx.req.get_body_data()
		local _, from = find(body, "<Encrypt><![CDATA[", 1, true)
		local to = from and find(body, "]]></Encrypt>", from, true)
		if not to then
			return ngx.exit(400)
		end
		local encrypted = sub(body, from + 1, to - 1)
		if sign(timestamp, nonce, encrypted) ~= args.msg_signature or math.abs(ngx.time() - tonumber(timestamp)) > window then
			return ngx.exit(403)
		end
		local text = open(encrypted)
		if not text then
			return ngx.exit(403)
		end
		local answer = ngx.location.capture("/backend", {
			method = ngx.HTTP_POST, body = text,
			args = { signature = args.signature, timestamp = timestamp, nonce = nonce, openid = args.openid },
		})
		if answer.status ~= 200 or answer.body == "" or answer.body == "success" then
			return ngx.print("success")
		end
		local now, sealed = tostring(ngx.time()), seal(answer.body)
		local out = "<xml><Encrypt><![CDATA[" .. sealed .. "]]></Encrypt><MsgSignature><![CDATA[" .. sign(now, nonce, sealed) ..
			"]]></MsgSignature><TimeStamp>" .. now .. "</TimeStamp><Nonce><![CDATA[" .. nonce .. "]]></Nonce></xml>"
		ngx.header["Content-Type"] = "text/xml"
		ngx.header["Content-Length"] = #out
		ngx.print(out)
	end
end
