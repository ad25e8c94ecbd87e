// Package wxsim is a WeChat for tests and for the demo: it issues, expires and refuses
// tokens, pushes tickets, events and messages with WeChat's retries and timing, answers the
// API calls that our tests make and runs the web-authorization page.
//
// It is an independent judge. It has its own small implementation of the push encryption
// (crypt.go) and imports nothing of this project, so that a mistake in package crypto cannot
// hide itself by being made on both sides. Whatever a well-behaved gateway must never send
// is recorded in the [Journal] as a [Violation]; a reply is read as strictly as WeChat reads it.
//
// It is hostile by default: some pushes come twice, queries are reordered and carry unknown
// parameters, envelopes have stray bytes around them, some answers are lost or slow, some
// tokens die early. What it does is a function of [Config.Seed] and of how often the same
// thing was asked for before, so a run can be repeated. [Faults] switches each of these off.
//
// A test:
//
//	sim := wxsim.New(wxsim.Config{
//		Platforms: []wxsim.Platform{{AppID: "wx…", Secret: "…", Token: "…", AESKey: "…"}},
//		Faults:    wxsim.Faults{Polite: true},
//	})
//	if err := sim.Start("127.0.0.1:0"); err != nil { … }
//	defer sim.Close()
//	// start the gateway with api = sim.URL(), then
//	sim.SetURLs("wx…", gateway+"/wx/event", gateway+"/wx/message/$APPID$")
//	sim.PushTicket(ctx, "wx…")
//	sim.Authorize(ctx, "wx…", "wx…")
//	got, err := sim.PushMessage(ctx, wxsim.Message{Platform: "wx…", AppID: "wx…", Content: "hello"})
//
// No test needs to wait by sleeping: [Journal.Wait] waits for what the gateway does next.
package wxsim
