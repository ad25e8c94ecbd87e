#!/bin/sh
# Looks for what must not be in a published file: names that only mean something on the machine at hand
# (its folders, the mirrors that its package clients are set up with), and private keys.
# The names are read off the machine, so that none has to be written down here.
set -eu

mkdir -p .run
names=.run/scan-names
files=.run/scan-files

{
	# Where this checkout lies, and the folder around it unless it is one that every machine has.
	pwd -P
	around=$(dirname "$(pwd -P)")
	case $around in
	/ | /bin | /etc | /home | /mnt | /opt | /root | /srv | /tmp | /usr | /usr/src | /var | /var/tmp) ;;
	*) echo "$around/" ;;
	esac
	case ${HOME:-/} in
	/) ;;
	*) echo "${HOME%/}/" ;;
	esac
	go env GOMODCACHE GOCACHE
	# The hosts of Go's, Debian's and npm's registries.
	{
		go env GOPROXY | tr ',|' '\n\n'
		cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -v '^#' || true
		cat "${HOME:-/nonexistent}/.npmrc" 2>/dev/null || true
		echo "${npm_config_registry:-${NPM_CONFIG_REGISTRY:-}}"
	} | grep -o '[a-z]*://[^/ ]*' | sed -e 's|.*://||' -e 's|.*@||' -e 's|:[0-9]*$||' || true
} | sort -u | grep . >"$names"

# Files that are tracked or about to be.
git ls-files -z --cached --others --exclude-standard >"$files"

found=0
if xargs -0 -r grep -nIFs -f "$names" -- <"$files"; then
	echo "scan: these lines name this machine or its mirrors" >&2
	found=1
fi
if xargs -0 -r grep -nIEs -e '-----BEGIN ([A-Z]+ )?PRIVATE KEY-----$' -- <"$files"; then
	echo "scan: these files hold a private key" >&2
	found=1
fi
[ "$found" -eq 0 ] && echo "scan: $(tr -cd '\0' <"$files" | wc -c) files, nothing found"
exit "$found"
