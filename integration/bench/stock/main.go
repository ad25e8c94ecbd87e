// Command stock is Caddy with its standard modules and nothing of ours: what the benchmark holds the gateway against. It is
// built from the same go.mod, by the same Go, with the same flags.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

func main() { caddycmd.Main() }
