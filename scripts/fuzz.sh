#!/bin/sh
# Fuzzes every fuzz target of the module, or FUZZTARGET alone, one after the other. They share FUZZTIME seconds (60).
# An input that fails is kept below the package's testdata/fuzz: commit it with the fix.
set -eu

total=${FUZZTIME:-60}
total=${total%s}
wanted=${FUZZTARGET:-Fuzz.*}
work=.run/fuzz
mkdir -p "$work"
: >"$work/targets"

# Only packages that hold a target are asked for their list, for asking compiles a package's tests.
grep -rl --include='*_test.go' '^func Fuzz' . | grep -v -e '/testdata/' -e '^\./\.' | xargs -r -n 1 dirname | sort -u >"$work/packages"
while read -r package; do
	go test -list '^Fuzz' "$package" >"$work/list"
	sed -n "s|^\($wanted\)\$|$package \1|p" "$work/list" >>"$work/targets"
done <"$work/packages"

count=$(wc -l <"$work/targets")
if [ "$count" -eq 0 ]; then
	echo "fuzz: no target found" >&2
	exit 1
fi
each=$((total / count))
[ "$each" -ge 1 ] || each=1
echo "fuzz: $count targets, ${each} s each"

# hangs reports whether the number of executions stands still at the end of a fuzzer's output, or nothing was executed. Its last second may have
# two lines.
hangs() {
	awk -F '[ ,]+' '/^fuzz: elapsed: .* gathering baseline coverage: [1-9]/ { ran = 1 }
		/^fuzz: elapsed: .* execs: / { if ($3 != at) { before = n; at = $3 } n = $5; ran = ran || n > 0 }
		END { exit !(!ran || before != "" && before == n) }' "$1"
}

failed=0
while read -r package target; do
	echo "== $package $target"
	# A minute for making each new input smaller, which is the default, would be most of the time for the larger targets.
	if go test -run '^$' -fuzz "^$target\$" -fuzztime "${each}s" -fuzzminimizetime 2s "$package" >"$work/output" 2>&1 </dev/null; then
		grep -E '^(fuzz: elapsed|ok)' "$work/output" | tail -n 2
		continue
	fi
	# The fuzzer reports its own deadline as a failure now and then (golang/go#75804). A real failure names its input, and a
	# target that hangs has executed nothing since an earlier second.
	if grep -q 'context deadline exceeded' "$work/output" &&
		! grep -q -e 'Failing input written' -e 'testdata/fuzz' -e 'panic:' -e 'hung' "$work/output" &&
		! hangs "$work/output"; then
		echo "fuzz: that was the fuzzer's own deadline and no finding"
		continue
	fi
	cat "$work/output"
	failed=$((failed + 1))
done <"$work/targets"

if [ "$failed" -gt 0 ]; then
	echo "fuzz: $failed of $count targets failed" >&2
	exit 1
fi
