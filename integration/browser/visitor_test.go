package browser_test

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/audits"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/cdp/jsonv2"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// device is what a visitor holds.
type device struct {
	name, agent   string
	width, height int64
	scale         float64
	mobile        bool
}

var (
	desktop = device{
		name: "desktop", width: 1280, height: 800, scale: 1,
		agent: "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/148.0.0.0 Safari/537.36",
	}
	phone = device{
		name: "phone", width: 390, height: 844, scale: 2, mobile: true,
		agent: "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148 " +
			"MicroMessenger/8.0.60(0x18003c2f) NetType/WIFI Language/zh_CN",
	}
)

const (
	chinese = "zh-CN,zh;q=0.9"
	english = "en-US,en;q=0.9"
)

// stepLimit is how long anything that a visitor does may take.
const stepLimit = 20 * time.Second

// visitor is a person with a browser of their own: other visitors' cookies are not in it.
type visitor struct {
	t        *testing.T
	w        *world
	ctx      context.Context
	device   device
	language string

	at     string // the address that was arrived at
	status int64

	mu         sync.Mutex
	asked      []string                     // addresses asked for
	requests   map[network.RequestID]string // addresses
	documents  map[string]bool              // addresses of pages
	answered   map[string]int64             // statuses by address
	returned   string                       // where WeChat sent the visitor back to last
	complaints []complaint
}

func newVisitor(t *testing.T, w *world, d device, language string) *visitor {
	t.Helper()
	ctx, cancel := chromedp.NewContext(w.chromium, chromedp.WithNewBrowserContext())
	t.Cleanup(cancel)
	v := &visitor{t: t, w: w, ctx: ctx, device: d, language: language,
		requests: map[network.RequestID]string{}, documents: map[string]bool{}, answered: map[string]int64{}}
	if err := chromedp.Do(ctx); err != nil { // opens the tab, which ends with this context
		t.Fatal(err)
	}
	if err := chromedp.Listen(ctx, v.observe); err != nil {
		t.Fatal(err)
	}
	set(v, network.Enable, network.EnableParams{})
	set(v, log.Enable, cdp.Empty{})
	set(v, audits.Enable, cdp.Empty{})
	set(v, runtime.Enable, cdp.Empty{})
	set(v, emulation.SetFocusEmulationEnabled, emulation.SetFocusEmulationEnabledParams{Enabled: true})
	set(v, emulation.SetUserAgentOverride, emulation.SetUserAgentOverrideParams{UserAgent: d.agent, AcceptLanguage: language})
	set(v, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{
		Width: d.width, Height: d.height, DeviceScaleFactor: d.scale, Mobile: d.mobile,
	})
	set(v, emulation.SetTouchEmulationEnabled, emulation.SetTouchEmulationEnabledParams{Enabled: d.mobile})
	return v
}

// set gives the tab a command.
func set[P, R any](v *visitor, command cdp.Command[P, R], params P) {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(v.ctx, stepLimit)
	defer cancel()
	if _, err := chromedp.Call(ctx, command, params); err != nil {
		v.t.Fatalf("%s: %v", command.Method, err)
	}
}

// get does something in the tab that has a result.
func get[T any](v *visitor, action chromedp.Action[T]) T {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(v.ctx, stepLimit)
	defer cancel()
	result, err := chromedp.Run(ctx, action)
	if err != nil {
		v.t.Fatalf("at %s: %v", v.at, err)
	}
	return result
}

// complaint is what the browser has against a page.
type complaint struct{ text, address string }

// observe writes down what goes on in the tab.
func (v *visitor) observe(event any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch e := event.(type) {
	case *network.EventRequestWillBeSent:
		from, _ := e.Request.Headers["Referer"].(string)
		if sent := fmt.Sprint(e.Request.Headers); strings.Contains(sent, "code=") && !strings.HasPrefix(from, v.w.WeChat.URL()+"/") { // of WeChat's pages it is WeChat's
			v.complaints = append(v.complaints, complaint{"a code in the header of a request: " + sent, e.Request.URL})
		}
		v.asked = append(v.asked, e.Request.URL)
		v.requests[e.RequestID] = e.Request.URL
		if e.Type == network.ResourceTypeDocument {
			v.documents[e.Request.URL] = true
		}
		if from := e.RedirectResponse; from != nil && strings.HasPrefix(from.URL, v.w.WeChat.URL()+"/") {
			v.returned = e.Request.URL
		}
	case *log.EventEntryAdded:
		v.complaints = append(v.complaints, complaint{fmt.Sprintf("%s %s: %s", e.Entry.Source, e.Entry.Level, e.Entry.Text), e.Entry.URL})
	case *network.EventResponseReceivedExtraInfo:
		v.answered[v.requests[e.RequestID]] = e.StatusCode
	case *audits.EventIssueAdded:
		if e.Issue.Code == audits.InspectorIssueCodeBounceTrackingIssue {
			return // a login redirects to and fro, and a browser that nobody has used before says so
		}
		details, err := jsonv2.Marshal(e.Issue.Details)
		v.complaints = append(v.complaints, complaint{fmt.Sprintf("issue %s: %s %v", e.Issue.Code, details, err), ""})
	case *runtime.EventExceptionThrown:
		v.complaints = append(v.complaints, complaint{"exception: " + e.ExceptionDetails.Text, e.ExceptionDetails.URL})
	case *runtime.EventConsoleAPICalled:
		v.complaints = append(v.complaints, complaint{fmt.Sprintf("console.%s", e.Type), ""})
	}
}

// open goes to an address that was typed, scanned, or chosen from a menu of the account's.
func (v *visitor) open(address string) {
	v.t.Helper()
	v.follow(chromedp.Navigate(address))
}

// click presses what the selector finds, with a mouse or a finger, and follows where that leads.
func (v *visitor) click(selector string) {
	v.t.Helper()
	if v.device.mobile {
		v.follow(chromedp.Tap(chromedp.CSS(selector)))
		return
	}
	v.follow(chromedp.Click(chromedp.CSS(selector)))
}

// back goes back, to a page that is loaded anew.
func (v *visitor) back() {
	v.t.Helper()
	v.follow(chromedp.NavigateBack())
}

// follow does something that loads a page, and waits until it is there.
func (v *visitor) follow(step chromedp.Action[chromedp.Void]) {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(v.ctx, stepLimit)
	defer cancel()
	response, err := chromedp.RunResponse(ctx, step)
	if err != nil {
		v.t.Fatalf("from %s: %v", v.at, err)
	}
	v.status = response.Status
	v.at = get(v, chromedp.Location())
}

// tab presses the tab key until the focus has left the page, and returns the words of what had it. The focus must show.
func (v *visitor) tab() (words []string) {
	v.t.Helper()
	const most = 20
	for range most {
		get(v, chromedp.KeyEvent(kb.Tab))
		focused := get(v, chromedp.Evaluate[struct{ Text, Outline string }](`(() => {
			const e = document.activeElement;
			return e === document.body ? {Text: "", Outline: ""} : {Text: e.innerText, Outline: getComputedStyle(e).outlineStyle};
		})()`))
		if focused.Text == "" || len(words) > 0 && focused.Text == words[0] {
			return words
		}
		if focused.Outline == "none" {
			v.t.Errorf("%s: nothing shows that %q has the focus", v.at, focused.Text)
		}
		words = append(words, focused.Text)
	}
	v.t.Fatalf("%s: more than %d stops: %q", v.at, most, words)
	return nil
}

// look is what a page looks like.
type look struct {
	Lang, Title, Mode, Text string
	Page, Referrer          string // all of it, and where it was come from
	Wide                    int    // pixels more than the screen has
	Small                   []string
}

// see checks the page that was arrived at: one of ours, with this status and these words; that the browser has nothing
// against it; and that it fits the screen and can be pressed. It takes a picture.
func (v *visitor) see(name string, status int64, words ...string) {
	v.t.Helper()
	v.settle()
	got := get(v, chromedp.Evaluate[look](`({
		Lang: document.documentElement.lang, Title: document.title, Mode: document.compatMode, Text: document.body.innerText,
		Page: document.documentElement.outerHTML, Referrer: document.referrer,
		Wide: Math.ceil(document.documentElement.scrollWidth - innerWidth),
		Small: [...document.querySelectorAll("a")].filter(a => a.offsetParent && a.offsetHeight < 44).map(a => a.innerText),
	})`))
	language := "zh-CN"
	if v.language == english {
		language = "en"
	}
	if v.status != status || got.Lang != language || got.Title == "" || got.Mode != "CSS1Compat" {
		v.t.Errorf("%s: status %d, want %d; %+v", name, v.status, status, got)
	}
	if at, err := url.Parse(v.at); err != nil {
		v.t.Error(err)
	} else {
		for parameter, values := range at.Query() {
			if value := values[0]; len(value) > 8 && !strings.HasSuffix(parameter, "appid") && strings.Contains(got.Page, value) {
				v.t.Errorf("%s: the page shows the %s of its address", name, parameter)
			}
		}
	}
	if strings.Contains(got.Referrer, "code=") {
		v.t.Errorf("%s: the page before has told its address: %s", name, got.Referrer)
	}
	for _, word := range words {
		if !strings.Contains(got.Text, word) {
			v.t.Errorf("%s does not say %q:\n%s", name, word, got.Text)
		}
	}
	if got.Wide > 0 || len(got.Small) > 0 {
		v.t.Errorf("%s: %d pixels too wide, links too small to press: %q", name, got.Wide, got.Small)
	}
	v.content(name)
	v.picture(name)
}

// settle waits until everything of the page is there and was drawn.
func (v *visitor) settle() {
	v.t.Helper()
	get(v, chromedp.Evaluate[bool](`new Promise(done => {
		const drawn = () => requestAnimationFrame(() => requestAnimationFrame(() => done(true)));
		document.readyState === "complete" ? drawn() : addEventListener("load", drawn);
	})`, chromedp.EvalAwaitPromise))
}

// content fails for whatever the browser has against what it saw so far, and for requests to anywhere but the cast.
func (v *visitor) content(name string) {
	v.t.Helper()
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, c := range v.complaints {
		// To the browser, a page whose status tells of an error is a resource that it failed to load.
		if v.documents[c.address] && strings.Contains(c.text, "the server responded with a status of") {
			continue
		}
		v.t.Errorf("%s: the browser complains of %s: %s", name, c.address, c.text)
	}
	v.complaints = nil
	for _, address := range v.asked {
		u, err := url.Parse(address)
		if err != nil {
			v.t.Error(err)
			continue
		}
		origin := u.Scheme + "://" + u.Host
		if u.Scheme != "data" && !slices.Contains(append([]string{v.w.URL(""), v.w.web, v.w.WeChat.URL(), "https://" + pictureHost}, v.w.more...), origin) {
			v.t.Errorf("%s: the browser asked %s", name, origin)
		}
	}
	v.asked = nil
}

// screenshots is the folder that the environment names; without one they are nowhere.
var screenshots = os.Getenv("WECHAT_SCREENSHOTS")

// picture takes a picture of the page by day and by night, if somebody wants to see it.
func (v *visitor) picture(name string) {
	v.t.Helper()
	if screenshots == "" {
		return
	}
	language, _, _ := strings.Cut(v.language, "-")
	for _, scheme := range []string{"dark", "light"} {
		set(v, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
		})
		v.settle()
		file := filepath.Join(screenshots, strings.Join([]string{name, v.device.name, language, scheme}, "-")+".png")
		if err := os.WriteFile(file, get(v, chromedp.CaptureScreenshot()), 0o600); err != nil {
			v.t.Fatal(err)
		}
	}
}
