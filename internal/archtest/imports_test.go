// Package archtest holds the direction of the dependencies between the packages of this repository;
// docs/architecture.md has the picture.
package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/caddy-wechat/caddy-wechat"

// pkg is what `go list -json` says of a package.
type pkg struct {
	ImportPath   string
	Standard     bool
	Imports      []string
	TestImports  []string
	XTestImports []string
}

type graph map[string]pkg

// room is what the packages below one folder may import themselves (each entry names a package and
// all below it) and what they may not reach at all, however indirectly. Tests may import more.
type room struct {
	path    string // below the module; the packages below it are of the same room
	may     []string
	any     bool // may import anything but what is forbidden
	mayNot  []string
	without []string // folders below path that are not of the room
}

var rooms = []room{
	{path: "internal/secret"},
	{path: "internal/http1", may: []string{"golang.org/x/net"}},
	{path: "internal/offheap", may: []string{"golang.org/x/sys"}},
	{path: "crypto", may: []string{module + "/internal/secret"}},
	{
		path: "tokens",
		may: []string{
			module + "/internal/secret", module + "/crypto", module + "/tokens",
			"github.com/dgraph-io/ristretto/v2", "github.com/jellydator/ttlcache/v3", "golang.org/x/sync",
		},
		mayNot:  []string{"github.com/caddyserver", "go.uber.org/zap", "github.com/prometheus"},
		without: []string{"tokens/storetest", "tokens/redisstore"},
	},
	{
		path: "tokens/redisstore",
		may: []string{
			module + "/internal/secret", module + "/tokens", "github.com/redis/go-redis/v9",
		},
		mayNot: []string{"github.com/caddyserver", "go.uber.org/zap", "github.com/prometheus"},
	},
	{
		// The conformance suite of the stores: called by tests, so it may use what tests use.
		path:   "tokens/storetest",
		any:    true,
		mayNot: []string{"github.com/caddyserver", "go.uber.org/zap", "github.com/prometheus", module + "/caddymodule"},
	},
	{
		// The simulator judges the gateway, so it shares no code with it: a mistake made once is not made twice.
		path:   "integration/wxsim",
		any:    true,
		mayNot: []string{module + "/crypto", module + "/tokens", module + "/caddymodule", module + "/internal"},
	},
	{path: "caddymodule", any: true, mayNot: slices.Concat(
		[]string{module + "/integration", module + "/cmd", module + "/tokens/storetest"}, tooling, testOnly)},
}

// shipped are the packages that users build; what only tests need may not be in them.
var shipped = []string{module, module + "/cmd/caddy"}

// testOnly are the modules in go.mod that are there for tests.
var testOnly = []string{
	"go.uber.org/goleak", "pgregory.net/rapid", "github.com/google/go-cmp", "github.com/stretchr/testify",
	"github.com/caddyserver/caddy/v2/caddytest", "testing", "net/http/httptest",
}

// tooling are our own programs that build and test.
var tooling = []string{
	module + "/internal/archtest", module + "/internal/covercheck",
	module + "/internal/testrun", module + "/internal/xcaddybuild", module + "/internal/redistest", module + "/internal/stall",
}

func TestImports(t *testing.T) {
	t.Parallel()
	g := load(t)
	for _, r := range rooms {
		if len(g.below(r)) == 0 {
			t.Errorf("%s: no such package; a rule about nothing holds nothing", r.path)
		}
	}
	for _, v := range violations(g) {
		t.Error(v)
	}
}

// violations checks the whole graph and returns a line for each arrow that points the wrong way, sorted.
func violations(g graph) []string {
	var found []string
	for _, r := range rooms {
		for _, p := range g.below(r) {
			for _, i := range p.Imports {
				if !r.any && !g[i].Standard && !within(i, r.may) {
					found = append(found, fmt.Sprintf("%s imports %s, which %s may not", p.ImportPath, i, r.path))
				}
			}
			found = append(found, g.reaching(p.ImportPath, r.mayNot)...)
		}
	}
	for _, p := range shipped {
		found = append(found, g.reaching(p, slices.Concat(testOnly, []string{module + "/tokens/storetest"}))...)
	}
	integration := []string{module + "/integration"}
	for _, p := range g {
		if within(p.ImportPath, integration) {
			continue
		}
		for _, i := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			if within(i, integration) {
				found = append(found, fmt.Sprintf("%s imports %s, which only integration may", p.ImportPath, i))
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// below returns the packages of a room.
func (g graph) below(r room) []pkg {
	var found []pkg
	var without []string
	for _, w := range r.without {
		without = append(without, module+"/"+w)
	}
	for _, p := range g {
		if within(p.ImportPath, []string{module + "/" + r.path}) && !within(p.ImportPath, without) {
			found = append(found, p)
		}
	}
	return found
}

// reaching walks the imports of from and says by which chain it comes to one of forbidden.
func (g graph) reaching(from string, forbidden []string) []string {
	var found []string
	chains := map[string]string{from: from}
	for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
		for _, i := range g[queue[0]].Imports {
			if _, seen := chains[i]; seen {
				continue
			}
			chains[i] = chains[queue[0]] + " → " + i
			if within(i, forbidden) {
				found = append(found, chains[i]+": forbidden")
				continue
			}
			queue = append(queue, i)
		}
	}
	return found
}

// within reports whether path is one of roots or below one.
func within(path string, roots []string) bool {
	return slices.ContainsFunc(roots, func(root string) bool {
		return path == root || strings.HasPrefix(path, root+"/")
	})
}

func load(t *testing.T) graph {
	t.Helper()
	mod, err := exec.CommandContext(t.Context(), "go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=ImportPath,Standard,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = filepath.Dir(string(bytes.TrimSpace(mod)))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	g := graph{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return g
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		g[p.ImportPath] = p
	}
}

// TestViolations breaks each rule in a graph that keeps them all.
func TestViolations(t *testing.T) {
	t.Parallel()
	sound := func() graph {
		g := graph{}
		for path, imports := range map[string][]string{
			module:                            {module + "/caddymodule"},
			module + "/cmd/caddy":             {module},
			module + "/internal/secret":       {"fmt"},
			module + "/crypto":                {"fmt", module + "/internal/secret"},
			module + "/tokens":                {module + "/crypto", "golang.org/x/sync/singleflight"},
			module + "/tokens/kvstore":        {module + "/tokens"},
			module + "/tokens/redisstore":     {module + "/tokens", "github.com/redis/go-redis/v9"},
			"github.com/redis/go-redis/v9":    {"fmt"},
			module + "/tokens/storetest":      {module + "/tokens", "testing"},
			module + "/caddymodule":           {module + "/tokens/kvstore", "github.com/caddyserver/caddy/v2"},
			module + "/integration/wxsim":     {"fmt"},
			module + "/integration":           {module + "/integration/wxsim", module + "/crypto"},
			"golang.org/x/sync/singleflight":  {"fmt"},
			"github.com/caddyserver/caddy/v2": {"go.uber.org/zap"},
			"go.uber.org/zap":                 {"fmt"},
			"example.test/helper":             {"go.uber.org/zap"},
		} {
			g[path] = pkg{ImportPath: path, Imports: imports}
		}
		for _, std := range []string{"fmt", "testing"} {
			g[std] = pkg{ImportPath: std, Standard: true}
		}
		return g
	}
	if v := violations(sound()); len(v) > 0 {
		t.Fatalf("the sound graph: %q", v)
	}
	tests := []struct {
		name, from, to string
		test           bool // a test's import
		says           string
	}{
		{name: "secret imports ours", from: "/internal/secret", to: module + "/crypto", says: "which internal/secret may not"},
		{name: "crypto imports tokens", from: "/crypto", to: module + "/tokens", says: "which crypto may not"},
		{name: "crypto imports a library", from: "/crypto", to: "golang.org/x/sync/singleflight", says: "which crypto may not"},
		{name: "tokens imports zap", from: "/tokens", to: "go.uber.org/zap", says: "which tokens may not"},
		{name: "kvstore imports caddy", from: "/tokens/kvstore", to: "github.com/caddyserver/caddy/v2", says: "which tokens may not"},
		{name: "tokens imports Redis", from: "/tokens", to: "github.com/redis/go-redis/v9", says: "which tokens may not"},
		{name: "redisstore imports a library", from: "/tokens/redisstore", to: "golang.org/x/sync/singleflight", says: "which tokens/redisstore may not"},
		{name: "tokens imports a library unasked", from: "/tokens", to: "example.test/helper", says: "→ example.test/helper → go.uber.org/zap: forbidden"},
		{name: "tokens imports caddymodule", from: "/tokens", to: module + "/caddymodule", says: "which tokens may not"},
		{name: "caddymodule imports integration", from: "/caddymodule", to: module + "/integration/wxsim", says: "which only integration may"},
		{name: "caddymodule imports a tool", from: "/caddymodule", to: module + "/internal/testrun", says: "forbidden"},
		{name: "caddymodule imports a test library", from: "/caddymodule", to: "go.uber.org/goleak", says: "→ go.uber.org/goleak: forbidden"},
		{name: "the command imports a test library", from: "/cmd/caddy", to: "github.com/google/go-cmp/cmp", says: "/cmd/caddy → github.com/google/go-cmp/cmp"},
		{name: "the simulator imports crypto", from: "/integration/wxsim", to: module + "/crypto", says: "wxsim → " + module + "/crypto: forbidden"},
		{name: "a test of crypto imports integration", from: "/crypto", to: module + "/integration/wxsim", test: true, says: "which only integration may"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			g := sound()
			p := g[module+tt.from]
			if tt.test {
				p.XTestImports = append(slices.Clone(p.XTestImports), tt.to)
			} else {
				p.Imports = append(slices.Clone(p.Imports), tt.to)
			}
			g[p.ImportPath] = p
			got := violations(g)
			if !slices.ContainsFunc(got, func(v string) bool { return strings.Contains(v, tt.says) }) {
				t.Errorf("got %q, want a line with %q; packages: %q", got, tt.says, slices.Sorted(maps.Keys(g)))
			}
		})
	}
}
