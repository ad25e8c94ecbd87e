package main

import (
	"fmt"
	"io"
)

// goal is what a figure of the gateway's must reach, and what it is to reach in the end.
type goal struct {
	gate, target float64
	more         bool // the more the better
}

// Goals by scenario; docs/performance.md says how they came about.
var (
	goalCPU    = map[string]goal{"inbound": {0.88, 0.96, true}, "outbound": {0.97, 1.03, true}, "outbound-h2": {0.97, 1.03, true}}
	goalOwn    = map[string]goal{"inbound": {12, 5, false}, "outbound": {5, 2, false}, "outbound-h2": {5, 2, false}}
	goalLean   = goal{1.10, 1.25, true} // inbound, over transport wechat_lean
	goalP99    = goal{1.15, 1, false}
	goalIdle   = goal{15, 10, false}
	goalAtWork = goal{25, 15, false}
)

// verdict is how a figure stands to the goal.
func (g goal) verdict(figure float64) string {
	reaches := func(mark float64) bool { return figure == mark || (figure > mark) == g.more }
	switch {
	case reaches(g.target):
		return "reaches the target"
	case reaches(g.gate):
		return "passes the gate"
	}
	return "**misses the gate**"
}

func (g goal) write(out io.Writer, what string, figure float64) {
	fmt.Fprintf(out, "- %s: %.3g, gate %g, target %g: %s\n", what, figure, g.gate, g.target, g.verdict(figure))
}

// goals print how the gateway stands in a scenario, in each of the ways that there are to the far end. What a transport of its own saves
// has a goal of its own.
func goals(out io.Writer, s *scenario) {
	fmt.Fprintln(out)
	stock := s.target(targetStock)
	for _, t := range s.targets {
		if t.name != targetGateway && t.name != targetGatewayHTTP {
			continue
		}
		if g, ok := goalCPU[s.name]; ok {
			what := "CPU, stock ÷ " + t.name
			if t.passing == targetSameLean {
				g, what = goalLean, what+", which goes over "+overLean+" where stock goes over its own"
			}
			g.write(out, what, over(stock.Full, t.Full, cpuRatio).Median)
		}
		if g, ok := goalOwn[s.name]; ok {
			g.write(out, "the same program's, "+t.name+" − passing on in the same way, CPU µs a request", over(t.Full, s.target(t.passing).Full, cpuMore).Median)
		}
		if len(t.Rated) > 0 {
			goalP99.write(out, "p99 at the fixed rate, "+t.name+" ÷ stock", over(t.Rated, stock.Rated, p99Ratio).Median)
		}
	}
}
