package browser_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/caddy-wechat/caddy-wechat/integration"
)

// watch notes what the page is kept from.
const watch = `window.violations = []; addEventListener("securitypolicyviolation", e => violations.push(e.violatedDirective + " " + e.blockedURI));`

// audit lists what people who see badly, use a keyboard or hold a small phone would stumble over.
const audit = `(phone => {
	const found = [], shown = e => e.checkVisibility({visibilityProperty: true}) && e.getClientRects().length > 0;
	const scope = document.querySelector("dialog[open]") || document;
	const all = [...scope.querySelectorAll("*")].filter(shown), where = e => e.outerHTML.slice(0, 90);
	const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
	for (const id of ids.filter((id, i) => ids.indexOf(id) !== i)) found.push("id twice: " + id);
	if (!["en", "zh-CN"].includes(document.documentElement.lang)) found.push("lang: " + document.documentElement.lang);
	if (document.querySelectorAll("main").length !== 1) found.push("main landmarks");
	for (const e of document.querySelectorAll("[aria-labelledby], [aria-describedby], label[for]")) {
		for (const name of ["aria-labelledby", "aria-describedby", "for"]) {
			for (const id of (e.getAttribute(name) || "").split(" ").filter(Boolean)) if (!document.getElementById(id)) found.push(name + " refers to nothing: " + id);
		}
	}
	for (const e of document.querySelectorAll("[style], [onclick], [onerror], [onload], style")) found.push("inline style or handler: " + where(e));
	for (const e of all) {
		if (e.tabIndex > 0) found.push("tabindex: " + where(e));
		if (e.matches("a, button")) {
			if (!(e.getAttribute("aria-label") || e.textContent).trim()) found.push("no name: " + where(e));
			if (e.tagName === "A" && e.hasAttribute("href") && !/^https?:$/.test(e.protocol)) found.push("link to " + e.protocol);
		}
		if (e.matches("input, select") && !e.labels.length) found.push("no label: " + where(e));
		if (e.matches("img") && !e.hasAttribute("alt")) found.push("no alt: " + where(e));
		if (e.matches("th") && !e.scope) found.push("no scope: " + where(e));
		if (phone && e.matches("button:not(.link), .button, nav a, input, select") && e.getBoundingClientRect().height < 43.5) found.push("too small to press: " + e.getBoundingClientRect().height + " " + where(e));
	}
	let level = scope === document ? 0 : 1;
	for (const e of all.filter(e => /^H[1-6]$/.test(e.tagName))) {
		const n = +e.tagName[1];
		if (n > level + 1) found.push("heading skips a level: " + where(e));
		level = n;
	}
	if (scope === document && all.filter(e => e.tagName === "H1").length !== 1) found.push("h1 is not there once");
	const wide = Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth;
	if (wide > 0) found.push(wide + " pixels too wide");
	for (const e of all) {
		const s = getComputedStyle(e), cut = e.scrollWidth - e.clientWidth;
		if (s.overflowX !== "visible" && s.textOverflow !== "ellipsis" && cut > 1 && !e.closest(".unseen, thead")) found.push(cut + " pixels cut off: " + where(e));
	}
	// Contrast, with what is behind the text put together from its ancestors.
	const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
	const known = new Map(), behinds = new Map([[null, {color: [255, 255, 255], opacity: 1}]]);
	const rgba = color => {
		if (!known.has(color)) {
			canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
			const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
			known.set(color, [r, g, b, a / 255]);
		}
		return known.get(color);
	};
	const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
	const luminance = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
	const back = e => {
		if (!behinds.has(e)) {
			const around = back(e.parentElement), s = getComputedStyle(e);
			behinds.set(e, {color: over(rgba(s.backgroundColor), around.color), opacity: around.opacity * s.opacity});
		}
		return behinds.get(e);
	};
	for (const e of all) {
		const texts = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.matches("input");
		if (!texts || e.closest(".unseen") || e.closest(".skip") || e.matches(":disabled") || e.closest("[aria-hidden]")) continue;
		const {color: behind, opacity} = back(e);
		const s = getComputedStyle(e), [r, g, b, a] = rgba(s.color), front = over([r, g, b, a * opacity], behind);
		const [hi, lo] = [luminance(front), luminance(behind)].sort((x, y) => y - x), ratio = (hi + .05) / (lo + .05);
		if (ratio < 4.5) found.push("contrast " + ratio.toFixed(2) + ": " + where(e));
	}
	return [...new Set(found)];
})`

// hasten has the page's timers run ten times as fast, but for the limits of how long an answer may take.
const hasten = `{ const set = setTimeout; window.setTimeout = (f, ms = 0, ...rest) => set(f, ms === 12000 || ms === 30000 ? ms : ms / 10, ...rest); window.pass = ms => new Promise(done => set(done, ms)); }`

// operator is a visitor of the console.
type operator struct {
	*visitor
	home   string // the console's address
	visits int
	// mayFail lets requests fail: the gateway is away, or answers that it cannot.
	mayFail bool
}

func newOperator(t *testing.T, w *world, d device, language, home string) *operator {
	t.Helper()
	v := newVisitor(t, w, d, language)
	set(v, page.Enable, page.EnableParams{})
	set(v, page.AddScriptToEvaluateOnNewDocument, page.AddScriptToEvaluateOnNewDocumentParams{Source: watch})
	return &operator{visitor: v, home: home}
}

// hurry has time pass faster in the pages that are opened from now on.
func (o *operator) hurry() {
	o.t.Helper()
	set(o.visitor, page.AddScriptToEvaluateOnNewDocument, page.AddScriptToEvaluateOnNewDocumentParams{Source: hasten})
}

// js evaluates an expression in the page.
func js[T any](o *operator, expression string) T {
	o.t.Helper()
	return get(o.visitor, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
}

// until waits for something to be so in the page.
func (o *operator) until(condition string) {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.ctx, stepLimit)
	defer cancel()
	for tick := time.NewTicker(20 * time.Millisecond); ; {
		if js[bool](o, "!!("+condition+")") {
			tick.Stop()
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			o.t.Fatalf("it does not come about that %s; the page says:\n%s", condition, js[string](o, "document.body.innerText"))
		}
	}
}

// visit opens a section of the console and waits until the gateway has answered.
func (o *operator) visit(section string) {
	o.t.Helper()
	o.visits++ // with another address than before, so that the page is loaded anew
	o.open(o.home + "?" + strconv.Itoa(o.visits) + section)
	o.until(`document.querySelector("#summary strong")`)
	switch section {
	case "#authorizers":
		o.until(`document.querySelectorAll("#accounts tbody tr").length || (document.querySelector("#accounts-empty").checkVisibility() && !/…$/.test(document.querySelector("#accounts-empty").textContent))`)
	case "#feed":
		o.until(`document.querySelectorAll("#entries tbody tr").length || !/…$/.test(document.querySelector("#entries-empty").textContent)`)
	case "#links":
		o.until(`document.querySelector("#funcs").children.length`)
	case "#errors/61004":
		o.until(`document.querySelector("#explained dd")`)
		o.until(`document.querySelectorAll("#refused tbody tr").length || (document.querySelector("#refused-empty").checkVisibility() && !/…$/.test(document.querySelector("#refused-empty").textContent))`)
	}
}

// judge holds what is shown against all that a page must be, by day and by night, and takes pictures.
func (o *operator) judge(name string, words ...string) {
	o.t.Helper()
	shown := js[string](o, "document.body.innerText")
	for _, junk := range []string{"[object", "undefined", "NaN", "Invalid Date"} {
		if strings.Contains(shown, junk) {
			o.t.Errorf("%s says %s:\n%s", name, junk, shown)
		}
	}
	for _, word := range words {
		if !strings.Contains(shown, word) {
			o.t.Errorf("%s does not say %q:\n%s", name, word, shown)
		}
	}
	language, _, _ := strings.Cut(o.language, "-")
	if got := js[string](o, "document.documentElement.lang"); !strings.HasPrefix(got, language) {
		o.t.Errorf("%s: lang is %s", name, got)
	}
	for _, colors := range []string{"dark", "light"} {
		set(o.visitor, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
			{Name: "prefers-color-scheme", Value: colors}, {Name: "prefers-reduced-motion", Value: "reduce"},
		}})
		o.settle()
		phone := "false"
		if o.device.mobile {
			phone = "true"
		}
		for _, complaint := range js[[]string](o, audit+"("+phone+")") {
			o.t.Errorf("%s, %s, %s, %s: %s", name, o.device.name, language, colors, complaint)
		}
		if screenshots != "" {
			file := filepath.Join(screenshots, strings.Join([]string{"console", name, o.device.name, language, colors}, "-")+".png")
			if err := os.WriteFile(file, o.photograph(), 0o600); err != nil {
				o.t.Fatal(err)
			}
		}
	}
	o.quiet(name)
}

// photograph is a picture of the whole page, or of what is to be seen of the feed, which is long, and while a drawer is open.
func (o *operator) photograph() []byte {
	o.t.Helper()
	if js[bool](o, `document.querySelector("#drawer").open || location.hash === "#feed"`) {
		return get(o.visitor, chromedp.CaptureScreenshot())
	}
	return get(o.visitor, chromedp.FullScreenshot(100))
}

// quiet fails for whatever the browser has against the page.
func (o *operator) quiet(name string) {
	o.t.Helper()
	if violations := js[[]string](o, "window.violations"); len(violations) > 0 {
		o.t.Errorf("%s: the policy was violated: %q", name, violations)
	}
	if js[bool](o, "window.pwned !== undefined") {
		o.t.Errorf("%s: data ran as a script", name)
	}
	o.mu.Lock()
	if o.mayFail {
		o.complaints = slices.DeleteFunc(o.complaints, func(c complaint) bool { return strings.Contains(c.text, "Failed to load resource") })
	}
	o.mu.Unlock()
	o.content(name)
}

// console shows the console every state that a gateway may be in, and has people use it.
func console(t *testing.T, w *world) {
	s := newStage(t, w)
	w.more = append(w.more, s.URL, "http://"+w.Console, "http://localhost:"+integration.Port(w.Console))
	t.Run("scenes", func(t *testing.T) {
		small := phone
		small.name, small.width, small.height = "small", 320, 568
		tablet, laptop := desktop, desktop
		tablet.name, tablet.width, tablet.height = "tablet", 768, 1024
		laptop.name, laptop.width, laptop.height = "laptop", 1024, 768
		all := []string{"#health", "#authorizers", "#feed", "#links", "#errors/61004"}
		health := all[:1]
		// Each scene is judged where it may go wrong: not in each way that it can be looked at.
		for _, as := range []struct {
			device   device
			language string
			shows    map[string][]string
		}{
			{desktop, english, map[string][]string{"healthy": all, "hostile": all, "sick-ticket": health}},
			{phone, chinese, map[string][]string{"healthy": all, "empty": all, "sick-store": health}},
			{desktop, chinese, map[string][]string{"sick-backends": health}},
			{small, english, map[string][]string{"hostile": all, "crowded": all[:2]}},
			{tablet, chinese, map[string][]string{"crowded": all}},
			{laptop, english, map[string][]string{"crowded": all}},
		} {
			o := newOperator(t, w, as.device, as.language, s.URL+"/")
			for _, now := range []scene{healthy(), empty(), ticketless(), storeless(), backendless(), hostile(), crowded()} {
				s.set(now)
				for _, section := range as.shows[now.name] {
					o.visit(section)
					name, _, _ := strings.Cut(section[1:], "/")
					o.judge(now.name + "-" + name)
				}
			}
		}
	})
	t.Run("codes", consoleCodes)
	t.Run("crowd", func(t *testing.T) { consoleCrowd(t, w, s) })
	t.Run("paper", func(t *testing.T) { consolePaper(t, w, s) })
	t.Run("no scripts", func(t *testing.T) { consoleScriptless(t, w, s) })
	t.Run("million", func(t *testing.T) { consoleMillion(t, w, s) })
	t.Run("keyboard", func(t *testing.T) { consoleKeyboard(t, w, s) })
	t.Run("feed", func(t *testing.T) { consoleFeed(t, w, s) })
	t.Run("reasons", func(t *testing.T) { consoleReasons(t, w, s) })
	t.Run("links", func(t *testing.T) { consoleLinks(t, w, s) })
	t.Run("choices", func(t *testing.T) { consoleChoices(t, w, s) })
	t.Run("away", func(t *testing.T) { consoleAway(t, w, s) })
	t.Run("gateway", func(t *testing.T) { consoleGateway(t, w) })
}

// consoleCrowd: a card that does not show all has what is not well, and a long one leaves no column empty.
func consoleCrowd(t *testing.T, w *world, s *stage) {
	s.set(crowded())
	o := newOperator(t, w, desktop, english, s.URL+"/")
	o.visit("#health")
	got := js[struct {
		Items        []string
		Tall, Widest float64
	}](o, `(() => {
		const card = [...document.querySelectorAll("#cards > .card")].find(c => c.querySelector("h2").textContent === "Accounts");
		const boxes = [...card.getClientRects()];
		return {
			Items: [...card.querySelectorAll(".item")].map(i => i.innerText.replaceAll("\n", " ")),
			Tall: document.querySelector("#cards").getBoundingClientRect().height, Widest: card.querySelectorAll(".item")[0].getBoundingClientRect().height * 50,
		};
	})()`)
	if len(got.Items) != 51 || !strings.HasPrefix(got.Items[0], "wx0000000000002122 problem") || got.Items[50] != "and 250 more" {
		t.Errorf("the card has %q", got.Items)
	}
	if got.Tall > got.Widest*2/3 {
		t.Errorf("the cards are %.0f pixels high, of which fifty accounts one below the other would be %.0f", got.Tall, got.Widest)
	}
	o.visit("#authorizers")
	name := js[struct {
		Title         string
		Lines, Narrow float64
	}](o, `(() => {
		const e = document.querySelector("#accounts .who");
		return {Title: e.title, Lines: e.getBoundingClientRect().height / parseFloat(getComputedStyle(e).lineHeight), Narrow: e.getBoundingClientRect().width};
	})()`)
	if name.Title != crowdedName || name.Lines > 1.5 || name.Narrow < 200 {
		t.Errorf("a long name is shown as %+v", name)
	}
	o.quiet("crowd")
}

// consolePaper: what is printed is dark on light, whatever the screen has, and has nothing to press.
func consolePaper(t *testing.T, w *world, s *stage) {
	s.set(crowded())
	o := newOperator(t, w, desktop, chinese, s.URL+"/")
	o.visit("#health")
	js[bool](o, `(document.querySelector("#theme").click(), document.querySelector("#theme").click(), true)`)
	set(o.visitor, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Media: "print", Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: "dark"}}})
	o.settle()
	for _, theme := range []string{"dark", "auto"} {
		got := js[[]string](o, `[document.documentElement.dataset.theme || "auto", getComputedStyle(document.documentElement).colorScheme, getComputedStyle(document.body).color, getComputedStyle(document.querySelector("header")).position,
			[...document.querySelectorAll("button, a, input, select")].filter(e => e.checkVisibility()).map(e => e.outerHTML).join(" ")]`)
		if want := []string{theme, "light", "rgb(27, 31, 35)", "static", ""}; !slices.Equal(got, want) {
			t.Errorf("on paper: %q, want %q", got, want)
		}
		js[bool](o, `(document.querySelector("#theme").click(), true)`) // to the next theme
		o.settle()
	}
	for _, complaint := range js[[]string](o, audit+"(false)") {
		t.Errorf("on paper: %s", complaint)
	}
	set(o.visitor, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{})
	o.quiet("paper")
}

// consoleScriptless: a browser without scripts says so, and shows nothing that would do nothing.
func consoleScriptless(t *testing.T, w *world, s *stage) {
	s.set(healthy())
	o := newOperator(t, w, phone, chinese, s.URL+"/")
	set(o.visitor, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true})
	o.open(o.home)
	if text := get(o.visitor, chromedp.Text(chromedp.CSS("body"))); !strings.Contains(text, "本页面需要 JavaScript") || strings.Contains(text, "Authorizers") || strings.Contains(text, "Health") {
		t.Errorf("without scripts the page says %q", text)
	}
	o.visitor.content("no scripts")
}

// consoleMillion pages through a million accounts and searches among them, and never has more than a page.
func consoleMillion(t *testing.T, w *world, s *stage) {
	s.set(million())
	o := newOperator(t, w, desktop, english, s.URL+"/")
	o.visit("#authorizers")
	first := js[string](o, `document.querySelector("#accounts tbody").innerText`)
	for n := range 3 {
		js[bool](o, `(document.querySelector("#next").click(), true)`)
		o.until(`document.querySelector("#page").textContent === "Page ` + string(rune('2'+n)) + `" && document.querySelector("#accounts tbody").innerText.includes("门店 ` + map[int]string{0: "000050", 1: "000100", 2: "000150"}[n] + `")`)
	}
	for n := range 3 {
		js[bool](o, `(document.querySelector("#previous").click(), true)`)
		o.until(`document.querySelector("#accounts tbody").innerText.includes("门店 ` + map[int]string{0: "000100", 1: "000050", 2: "000000"}[n] + `")`)
	}
	if got := js[string](o, `document.querySelector("#accounts tbody").innerText`); got != first {
		t.Error("back at the beginning there are others")
	}
	if rows := js[int](o, `document.querySelectorAll("#accounts tbody tr").length`); rows != 50 {
		t.Errorf("%d rows", rows)
	}
	get(o.visitor, chromedp.SendKeys(chromedp.CSS("#q"), "门店"))
	o.until(`document.querySelector("#index-note").checkVisibility()`)
	o.judge("million-search", "The index of names is being built: 640,000 accounts", "门店 777777")
	for _, r := range s.requests() {
		if strings.HasPrefix(r, "GET authorizers?") && !strings.Contains(r, "limit=50") {
			t.Errorf("asked for %s", r)
		}
	}
	// A choice among several platforms is asked of the gateway.
	js[bool](o, `(document.querySelector("#platform").value = "wx4444444444444444", document.querySelector("#platform").dispatchEvent(new Event("change")))`)
	o.until(`performance.getEntriesByType("resource").some(e => e.name.includes("platform=wx4444444444444444"))`)
	o.quiet("platform")
}

// consoleKeyboard uses the console without a mouse.
func consoleKeyboard(t *testing.T, w *world, s *stage) {
	s.set(healthy())
	o := newOperator(t, w, desktop, english, s.URL+"/")
	o.visit("#authorizers")
	o.settle()
	stops := o.stopsOf(40)
	want := []string{"Skip to the content", "Theme: auto", "中文", "Health", "Authorizers", "Live", "Links", "Errors", "#q", "New authorization", "老王水果店", "Sunrise Coffee 晨光咖啡", "城南图书馆", "(no name)"}
	if !slices.Equal(stops, want) {
		t.Errorf("the tab key stops at %q, want %q", stops, want)
	}
	js[bool](o, `(document.querySelector(".skip").focus(), true)`)
	get(o.visitor, chromedp.KeyEvent(kb.Enter))
	o.until(`document.activeElement.id === "main"`)
	get(o.visitor, chromedp.KeyEvent("/"))
	o.until(`document.activeElement.id === "q"`)
	// The slash comes as two events here, and the second may find the field focused already.
	js[bool](o, `(document.querySelector("#q").select(), true)`)
	get(o.visitor, chromedp.KeyEvent("Sunrise"))
	o.until(`document.querySelectorAll("#accounts tbody tr").length === 1`)
	get(o.visitor, chromedp.KeyEvent(kb.Tab)) // the button for a new authorization
	get(o.visitor, chromedp.KeyEvent(kb.Tab))
	get(o.visitor, chromedp.KeyEvent(kb.Enter))
	o.until(`document.querySelector("#drawer").open && document.querySelector("#detail dl")`)
	if !js[bool](o, `document.querySelector("#drawer").contains(document.activeElement)`) {
		t.Error("the drawer does not have the focus")
	}
	o.judge("drawer", "老王水果店", "gh_0123456789ab", "Official Account", "Messages", "61004", "white list", "/cgi-bin/user/info")
	js[bool](o, `(document.querySelector("#detail .acts button").focus(), true)`)
	get(o.visitor, chromedp.KeyEvent(kb.Enter))
	o.until(`document.querySelector("#detail-status").textContent.startsWith("Refreshed")`)
	if !slices.ContainsFunc(s.requests(), func(r string) bool {
		return strings.HasPrefix(r, "POST refresh/wx3333333333333332?platform=wx1111111111111111")
	}) {
		t.Errorf("asked %q", s.requests())
	}
	if js[bool](o, `document.activeElement === document.body`) {
		t.Error("the focus is lost after refreshing")
	}
	o.judge("drawer-refreshed")
	get(o.visitor, chromedp.KeyEvent(kb.Escape))
	o.until(`!document.querySelector("#drawer").open`)
	if got := js[string](o, `document.activeElement.textContent`); !strings.Contains(got, "Sunrise") {
		t.Errorf("after Esc the focus is on %q", got)
	}
	// What the gateway refuses is said.
	o.mayFail = true
	o.visit("#authorizers/wx9999999999999999")
	o.until(`document.querySelector("#detail").textContent.includes("no platform knows wx9999999999999999")`)
	get(o.visitor, chromedp.KeyEvent(kb.Escape))
	o.until(`location.hash === "#authorizers"`)
	o.quiet("keyboard")
	p := newOperator(t, w, phone, chinese, s.URL+"/")
	p.visit("#authorizers")
	js[bool](p, `(document.querySelector("#accounts tbody button").click(), true)`)
	p.until(`document.querySelector("#detail dl")`)
	p.judge("drawer", "刷新令牌", "消息管理权限", "白名单")
}

// stopsOf presses the tab key until the focus has been everywhere, and names what had it. The focus must show.
func (o *operator) stopsOf(most int) (names []string) {
	o.t.Helper()
	for range most {
		get(o.visitor, chromedp.KeyEvent(kb.Tab))
		focused := js[struct{ Name, Outline string }](o, `(() => {
			const e = document.activeElement;
			return {Name: e === document.body ? "" : e.matches("input") ? "#" + e.id : e.innerText.trim(), Outline: getComputedStyle(e).outlineStyle};
		})()`)
		if focused.Name == "" || len(names) > 0 && focused.Name == names[0] {
			return names
		}
		if focused.Outline == "none" {
			o.t.Errorf("nothing shows that %q has the focus", focused.Name)
		}
		names = append(names, focused.Name)
	}
	o.t.Fatalf("more than %d stops: %q", most, names)
	return nil
}

// consoleFeed watches what comes by, filters it and pauses it.
func consoleFeed(t *testing.T, w *world, s *stage) {
	s.set(healthy())
	o := newOperator(t, w, desktop, english, s.URL+"/")
	o.hurry()
	o.visit("#feed")
	rows := `document.querySelectorAll("#entries tbody tr").length`
	before := js[int](o, rows)
	o.until(rows + " > " + js[string](o, `String(`+rows+`)`))
	if newest := js[int](o, rows); newest <= before {
		t.Errorf("%d rows, then %d", before, newest)
	}
	js[bool](o, `(document.querySelector("#feed-outcome").value = "problems", document.querySelector("#feed-outcome").dispatchEvent(new Event("change")))`)
	if shown := js[string](o, `document.querySelector("#entries tbody").innerText`); strings.Contains(shown, "component_verify_ticket") || !strings.Contains(shown, "61004") {
		t.Errorf("problems only: %s", shown)
	}
	js[bool](o, `(document.querySelector("#feed-kind").value = "push", document.querySelector("#feed-kind").dispatchEvent(new Event("change")))`)
	if shown := js[string](o, `document.querySelector("#entries tbody").innerText`); strings.Contains(shown, "61004") || !strings.Contains(shown, "no backend could be reached: connection refused") {
		t.Errorf("problems of pushes only: %s", shown)
	}
	js[bool](o, `(document.querySelector("#feed-kind").value = "", document.querySelector("#feed-kind").dispatchEvent(new Event("change")))`)
	get(o.visitor, chromedp.SendKeys(chromedp.CSS("#feed-appid"), "wx333"))
	o.until(`document.querySelector("#missed").textContent.includes("until it is complete")`)
	get(o.visitor, chromedp.SendKeys(chromedp.CSS("#feed-appid"), "3333333333333"))
	o.until(`[...document.querySelectorAll("#entries tbody td:nth-child(3) button")].every(b => b.textContent === "wx3333333333333333") && ` + rows)
	js[bool](o, `(document.querySelector("#pause").click(), true)`)
	s.set(healthy())
	o.until(`document.querySelector("#pause").getAttribute("aria-pressed") === "true" && document.querySelector("#announce").textContent`)
	o.judge("feed-paused", "61004")
	o.untilAsked(s, "GET status?", 2) // and meanwhile nothing of the feed
	for _, r := range s.requests() {
		if strings.HasPrefix(r, "GET feed?") {
			t.Error("it is asked for the feed while that is paused")
			break
		}
	}
	// An entry's code leads to what it means.
	js[bool](o, `(document.querySelector("#entries tbody a").click(), true)`)
	o.until(`document.querySelector("#explained").textContent.includes("white list") && document.querySelector("#view-errors").checkVisibility()`)
	get(o.visitor, chromedp.SendKeys(chromedp.CSS("#code"), "0"))
	get(o.visitor, chromedp.KeyEvent(kb.Enter))
	o.until(`document.querySelector("#explained").textContent.includes("not in the table")`)
	get(o.visitor, chromedp.SendKeys(chromedp.CSS("#code"), "x"))
	get(o.visitor, chromedp.KeyEvent(kb.Enter))
	o.until(`document.querySelector("#explained").textContent.includes("is a number")`)
	// Nobody looks: nothing is asked.
	js[bool](o, `(Object.defineProperty(document, "hidden", {value: true, configurable: true}), document.dispatchEvent(new Event("visibilitychange")))`)
	o.settle()
	s.set(healthy())
	js[bool](o, `pass(1000).then(() => true)`) // twice as long as a status lasts
	if asked := s.requests(); len(asked) > 0 {
		t.Errorf("asked while hidden: %q", asked)
	}
	js[bool](o, `(Object.defineProperty(document, "hidden", {value: false, configurable: true}), document.dispatchEvent(new Event("visibilitychange")))`)
	o.untilAsked(s, "GET status?", 1)
	o.quiet("feed")
}

// consoleReasons: in Chinese, what the gateway says of why something was refused or failed is Chinese too.
func consoleReasons(t *testing.T, w *world, s *stage) {
	sick := ticketless()
	sick.entries, sick.refusals = healthy().entries, healthy().refusals
	s.set(sick)
	o := newOperator(t, w, desktop, chinese, s.URL+"/")
	o.visit("#feed")
	o.judge("reasons-feed", "无法连接后端：connection refused")
	o.visit("#errors/61004")
	o.judge("reasons-errors", "签名与配置的 token 都不符")
	o.visit("#health")
	js[bool](o, `([...document.querySelectorAll("#cards button")].find(b => b.dataset.key.startsWith("drain")).click(), true)`)
	o.until(`document.querySelector("#cards").textContent.includes("2 个中换取了 1 个；wx3333333333333337：仍在换取中")`)
	o.quiet("reasons")
}

// untilAsked waits until the stage was asked that often.
func (o *operator) untilAsked(s *stage, prefix string, times int) {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.ctx, stepLimit)
	defer cancel()
	for tick := time.NewTicker(20 * time.Millisecond); ; {
		n := 0
		for _, r := range s.requests() {
			if strings.HasPrefix(r, prefix) {
				n++
			}
		}
		if n >= times {
			tick.Stop()
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			o.t.Fatalf("asked %q", s.requests())
		}
	}
}

// consoleLinks tries the links of the gateway itself, and reads a QR code from the screen.
func consoleLinks(t *testing.T, w *world, s *stage) {
	s.set(healthy())
	o := newOperator(t, w, desktop, english, s.URL+"/")
	o.visit("#links")
	get(o.visitor, chromedp.SendKeys(chromedp.CSS("#fill-appid"), integration.AuthorizerID))
	link := w.startOf("scan", "")
	o.until(`[...document.querySelectorAll("#funcs a")].some(a => a.href === "` + link + `")`)
	js[bool](o, `([...document.querySelectorAll("#funcs button")].find(b => b.dataset.key === "qr `+link+`").click(), true)`)
	o.until(`document.querySelector("#funcs img")?.naturalWidth > 0`)
	o.judge("links-qr", "Scan it with WeChat.")
	if got := o.scanOf("#funcs img"); got != link {
		t.Errorf("the QR code says %s, want %s", got, link)
	}
	if start := js[string](o, `document.querySelector("#starts a").href`); start != w.URL(authorizePage) {
		t.Errorf("a new authorization begins at %s", start)
	}
	o.quiet("links")
}

// consoleChoices: language and looks are kept.
func consoleChoices(t *testing.T, w *world, s *stage) {
	s.set(healthy())
	o := newOperator(t, w, desktop, chinese, s.URL+"/")
	o.visit("#health")
	o.judge("choices", "一切正常")
	js[bool](o, `(document.querySelector("#language").click(), document.querySelector("#theme").click(), document.querySelector("#theme").click(), true)`)
	o.language = english
	o.visit("#health")
	if got := js[string](o, `document.documentElement.dataset.theme + " " + getComputedStyle(document.documentElement).colorScheme + " " + document.title`); got != "dark dark Health · WeChat gateway" {
		t.Errorf("after coming back: %s", got)
	}
	o.judge("choices", "All is well", "Theme: dark")
}

// consoleAway: the gateway goes away and comes back.
func consoleAway(t *testing.T, w *world, s *stage) {
	s.set(healthy())
	o := newOperator(t, w, desktop, english, s.URL+"/")
	o.mayFail = true
	o.hurry()
	o.visit("#health")
	gone := healthy()
	gone.gone = true
	s.set(gone)
	o.until(`document.querySelector("#away").checkVisibility() && /Next try in \d+ s/.test(document.querySelector("#away-text").textContent)`)
	o.untilAsked(s, "GET status?", 2)
	o.judge("away", "The gateway does not answer (no connection)", "All is well")
	s.set(ticketless())
	js[bool](o, `(document.querySelector("#again").click(), true)`)
	o.until(`!document.querySelector("#away").checkVisibility() && document.title.startsWith("(1)")`)
	o.judge("back", "Something is wrong", "13 hours ago", "To authorize again")
	// A button on a card has the gateway do something, and says how that went.
	js[bool](o, `([...document.querySelectorAll("#cards button")].find(b => b.dataset.key.startsWith("drain")).click(), true)`)
	o.until(`document.querySelector("#cards").textContent.includes("1 of 2 exchanged; wx3333333333333337: the attempt is still under way")`)
	o.quiet("drain")
	// An account that authorizes meanwhile appears, and the focus stays where it is.
	s.set(healthy())
	o.visit("#authorizers")
	js[bool](o, `(document.querySelector("#accounts tbody button").focus(), true)`)
	grown := healthy()
	grown.accounts = few(account(1, "老王水果店", "authorized"), account(5, "新来的小店", "authorized"))
	s.set(grown)
	o.until(`document.querySelector("#accounts tbody").innerText.includes("新来的小店")`)
	if got := js[string](o, `document.activeElement.textContent`); got != "老王水果店" {
		t.Errorf("after another account came the focus is on %q", got)
	}
	o.quiet("grown")
}

// consoleCodes: the findings that scenes have are such as a gateway has.
func consoleCodes(t *testing.T) {
	var source string
	for _, name := range []string{"status_findings.go", "status_sightings.go"} {
		text, err := os.ReadFile("../../caddymodule/" + name)
		if err != nil {
			t.Fatal(err)
		}
		source += string(text)
	}
	for _, s := range []scene{empty(), ticketless(), storeless(), backendless(), crowded()} {
		for _, f := range s.status["findings"].([]any) {
			code, _ := f.(map[string]any)["code"].(string)
			if host, _, isHost := strings.Cut(code, "_"); isHost && host == "host" {
				code = "host_"
			}
			if !strings.Contains(source, strconv.Quote(code)) {
				t.Errorf("%s: no gateway finds %s", s.name, code)
			}
		}
	}
}

// consoleGateway opens the console of the gateway itself, in each way that there is.
func consoleGateway(t *testing.T, w *world) {
	forwarded := forward(t, w.Console)
	w.more = append(w.more, "http://localhost:"+integration.Port(forwarded))
	for name, home := range map[string]string{
		"localhost": "http://localhost:" + integration.Port(w.Console) + "/", "address": "http://" + w.Console + "/",
		"forwarded": "http://localhost:" + integration.Port(forwarded) + "/",
	} {
		o := newOperator(t, w, desktop, english, home)
		o.open(home + "#links")
		o.until(`[...document.querySelectorAll("#funcs a")].some(a => a.href.endsWith("/wx/thirdParty/authorize/` + integration.AccountID + `/scan"))`)
		if o.status != http.StatusOK || !strings.HasPrefix(o.at, home) {
			t.Errorf("%s: %d at %s", name, o.status, o.at)
		}
		o.quiet(name)
		if name != "localhost" {
			continue
		}
		for _, section := range []string{"#health", "#authorizers", "#feed", "#errors/61004"} {
			o.visit(section)
			o.judge("real-"+strings.TrimSuffix(section[1:], "/61004"), map[string]string{
				"#health": integration.PlatformID, "#authorizers": integration.AuthorizerID, "#feed": "component_verify_ticket", "#errors/61004": "What to do",
			}[section])
		}
	}
	foreign := "http://" + accountHost + ":" + integration.Port(w.Console) // a name that anybody may let lead to this machine
	w.more = append(w.more, foreign)
	o := newOperator(t, w, desktop, english, w.URL("/console"))
	o.open(foreign)
	o.visitor.see("console-denied", http.StatusForbidden, "The console is not open to the outside", "ssh -L 9000:127.0.0.1:2020")
	set(o.visitor, network.SetExtraHTTPHeaders, network.SetExtraHTTPHeadersParams{Headers: network.Headers{"Authorization": "Basic Ym9iOmhpY2N1cA=="}})
	o.open(o.home + "#links") // without the slash, below a path that handle_path takes off
	if want := w.URL("/console/#links"); o.at != want || o.status != http.StatusOK {
		t.Errorf("logged in: %d at %s, want %s", o.status, o.at, want)
	}
	o.until(`[...document.querySelectorAll("#funcs a")].length > 0`)
	o.quiet("logged in")
	p := newOperator(t, w, phone, chinese, "")
	p.open(foreign)
	p.visitor.see("console-denied", http.StatusForbidden, "控制台不对外开放")
}

// forward lets an address be reached by another port, as ssh -L does.
func forward(t *testing.T, to string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = near.Close() }()
				far, err := net.Dial("tcp", to)
				if err != nil {
					return
				}
				defer func() { _ = far.Close() }()
				go func() { _, _ = io.Copy(far, near); _ = far.Close() }()
				_, _ = io.Copy(near, far)
			}()
		}
	}()
	return l.Addr().String()
}
