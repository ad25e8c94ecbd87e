#!/bin/sh
# Stands in for the gateway's program in the benchmark, as `-also nginx=integration/bench/nginx/run.sh`: reads from the
# Caddyfile where to listen and what to proxy to, and runs nginx with Lua in one process. Needs Debian's nginx-light and
# libnginx-mod-http-lua.
set -eu
while [ $# -gt 0 ]; do
	case $1 in
	--config) caddyfile=$2; shift ;;
	esac
	shift
done
here=$(cd "$(dirname "$0")" && pwd)
dir=$(dirname "$caddyfile")
word() { awk -v name="$1" '$1 == name { print $2; exit }' "$caddyfile"; }
port=$(sed -n 's|^http://:\([0-9]*\) {.*|\1|p' "$caddyfile")
backend=$(word reverse_proxy)
mkdir -p "$dir/tmp"
sed -e "s|@DIR@|$dir|; s|@ADMIN@|$(word admin)|; s|@PORT@|$port|; s|@BACKEND@|${backend#http://}|" \
	-e "s|@APPID@|$(word account)|; s|@TOKEN@|$(word token)|; s|@AES_KEY@|$(word aes_key)|; s|@LUA@|$here/push.lua|" \
	"$here/nginx.conf" >"$dir/nginx.conf"
exec /usr/sbin/nginx -p "$dir" -c "$dir/nginx.conf"
