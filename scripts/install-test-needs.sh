#!/bin/sh
# Installs what the tests need beside Go and make, where it is missing. Says nothing when all is there.
set -eu

packages=

# need TEST PACKAGE...: the Debian packages to install when the command TEST fails.
need() {
	if ! sh -c "$1" >/dev/null 2>&1; then
		shift
		packages="$packages $*"
	fi
}

# The race detector needs cgo: a C compiler and the C library's headers.
compiler=$(go env CC)
need "printf '#include <stdlib.h>\nint main(void) { return 0; }\n' | $compiler -x c -o /dev/null -" gcc libc6-dev

# The store redis is tested against real servers, which the tests start themselves.
need 'redis-server --version' redis-server

# The SDKs for Node.
need 'node --version && npm --version' nodejs npm

# The browser that goes through the pages, and a font with Chinese characters, for whoever looks at its pictures. Fonts are
# no reason to bother who has a browser and no fontconfig's tools; Chromium brings these.
browser='chromium --version || chromium-browser --version || google-chrome --version || google-chrome-stable --version'
need "$browser" chromium
need "if command -v fc-list; then fc-list :lang=zh | grep .; else $browser; fi" fonts-wqy-zenhei

install_packages() {
	if ! command -v apt-get >/dev/null 2>&1; then
		echo "The tests need what these Debian packages hold:$packages" >&2
		echo "Install them, or what your system calls them, and try again." >&2
		exit 1
	fi
	if [ "$(id -u)" -ne 0 ]; then
		# Not this script by sudo: what npm writes below would be root's, and Go may not be on root's PATH.
		echo "The tests need packages that only root can install. Install them and try again:" >&2
		echo "sudo apt-get update && sudo apt-get install -y --no-install-recommends$packages" >&2
		exit 1
	fi
	echo "Installing what the tests need:$packages"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q
	# shellcheck disable=SC2086 # a list of words
	apt-get install -q -y --no-install-recommends $packages
}
[ -z "$packages" ] || install_packages

# What the SDKs for Node are, as their lock file says; npm writes the other file when it is done.
cd "$(dirname "$0")/../integration/sdk"
if [ -z "$(find node_modules/.package-lock.json -newer package-lock.json 2>/dev/null)" ]; then
	npm ci --ignore-scripts --no-progress --loglevel=error
fi
