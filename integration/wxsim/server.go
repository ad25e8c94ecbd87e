package wxsim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Server is the simulated WeChat: an http.Handler for all of its hosts, and the sender of its
// pushes. Its methods may be called from any goroutine.
type Server struct {
	cfg     Config
	err     error // what is wrong with cfg
	routes  map[string]route
	journal *Journal
	dice    *dice
	pushing *http.Client

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	faultMu  sync.Mutex
	prepared map[string][]*Fault

	watcher atomic.Pointer[func(Progress)] // see Watch
	ahead   atomic.Int64                   // see SetClock

	mu             sync.Mutex
	closed         bool
	servers        []*http.Server
	url, tlsURL    string
	platforms      map[string]*platform
	accounts       map[string]*account // every account there is, authorizers too
	authorizations map[pair]*authorization
	creds          map[string]*credential
	current        map[holder]*credential // newest of each
	users          map[string]User        // by openid
	visitors       map[string]User        // by appid: who opens the OAuth page
	refuseNext     bool
	choices        map[string]choice // buttons of pages that ask
	renewing       map[holder]int    // renewals in flight
	forgiven       map[whose]bool    // Server.AllowRefresh
	used           map[[2]string]int
	forced         map[string]*forcing
	media          map[string]medium
	menus          map[string][]byte
	wxa            map[string]*codeFlow
	sent           []Sent
	sentChanged    chan struct{}
	msgID          int64
	secrets        []string        // all secret values, issued and configured
	configured     map[string]bool // those that were not issued
}

type pair struct{ platform, appID string }

// platform is a Platform with what it is given while running.
type platform struct {
	Platform
	crypt    *Crypt
	stopped  bool // too many wrong answers to tickets
	failures int
	prevAt   time.Time // when the newest ticket was made
}

// account is any account: plain, authorizer or both.
type account struct {
	Account
	crypt *Crypt // nil for a mere authorizer
	plain bool   // named in Config.Accounts: has a secret of its own
}

// authorization is what an account granted to a platform.
type authorization struct {
	active    bool
	exchanged bool // a code of it was exchanged, so the refresh token is known to the platform
	refresh   *credential
	sets      []int
	at        time.Time
}

func (a *authorization) live() bool { return a != nil && a.active }

// New returns a WeChat in which cfg's platforms and accounts exist and nobody has authorized
// anything yet. A mistake in cfg is reported by Start, StartTLS and every push.
func New(cfg Config) *Server {
	cfg.Lives, cfg.Pace, cfg.Faults = cfg.Lives.withDefaults(), cfg.Pace.withDefaults(), cfg.Faults.withDefaults()
	s := &Server{
		cfg: cfg, routes: apiRoutes(), journal: newJournal(cfg.JournalSize, cfg.Observe), dice: newDice(cfg.Seed),
		prepared: map[string][]*Fault{}, platforms: map[string]*platform{}, accounts: map[string]*account{},
		authorizations: map[pair]*authorization{}, creds: map[string]*credential{}, current: map[holder]*credential{},
		users: map[string]User{}, visitors: map[string]User{}, choices: map[string]choice{}, renewing: map[holder]int{}, forgiven: map[whose]bool{}, used: map[[2]string]int{},
		forced: map[string]*forcing{}, media: map[string]medium{}, menus: map[string][]byte{}, wxa: map[string]*codeFlow{},
		sentChanged: make(chan struct{}), configured: map[string]bool{},
		msgID: time.Now().UnixNano(),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.pushing = newPushClient(cfg.PushRoots, cfg.PushDial, cfg.PushApart)
	var errs []error
	for _, p := range cfg.Platforms {
		errs = append(errs, s.addPlatform(p))
	}
	for _, a := range cfg.Accounts {
		errs = append(errs, s.addAccount(a))
	}
	for _, a := range cfg.Authorizers {
		s.addAuthorizer(a)
	}
	s.err = errors.Join(errs...)
	return s
}

func (s *Server) addPlatform(p Platform) error {
	crypt, err := NewCrypt(p.Token, p.AESKey, p.AppID)
	if err == nil && crypt.block == nil {
		err = errors.New("no aes key: platforms have safe mode only")
	}
	if err != nil {
		return fmt.Errorf("platform %s: %w", p.AppID, err)
	}
	s.platforms[p.AppID] = &platform{Platform: p, crypt: crypt}
	s.keep(p.Secret, p.Token, p.AESKey)
	return nil
}

func (s *Server) addAccount(a Account) error {
	if a.Mode == "" {
		a.Mode = ModeSafe
		if a.AESKey == "" {
			a.Mode = ModePlain
		}
	}
	if a.Format == "" {
		a.Format = FormatXML
	}
	crypt, err := NewCrypt(a.Token, a.AESKey, a.AppID)
	if err == nil && crypt.block == nil && a.Mode != ModePlain {
		err = fmt.Errorf("mode %s needs an aes key", a.Mode)
	}
	if err != nil {
		return fmt.Errorf("account %s: %w", a.AppID, err)
	}
	if a.OriginalID == "" {
		a.OriginalID = originalID(a.AppID)
	}
	a.FuncInfo = defaultSets(a.FuncInfo, a.MiniProgram)
	s.accounts[a.AppID] = &account{Account: a, crypt: crypt, plain: true}
	s.keep(a.Secret, a.Token, a.AESKey)
	return nil
}

// addAuthorizer adds an account without a secret, unless the appid is known already.
func (s *Server) addAuthorizer(a Authorizer) *account {
	if known := s.accounts[a.AppID]; known != nil {
		return known
	}
	if a.OriginalID == "" {
		a.OriginalID = originalID(a.AppID)
	}
	if a.NickName == "" {
		a.NickName = "account " + a.AppID
	}
	acc := &account{Account: Account{
		AppID: a.AppID, OriginalID: a.OriginalID, NickName: a.NickName, MiniProgram: a.MiniProgram,
		FuncInfo: defaultSets(a.FuncInfo, a.MiniProgram), Format: FormatXML,
	}}
	s.accounts[a.AppID] = acc
	return acc
}

func originalID(appID string) string { return "gh_" + signSorted(appID)[:12] }

// keep remembers secret values that were not issued but configured.
func (s *Server) keep(values ...string) {
	for _, v := range values {
		if v != "" && !s.configured[v] {
			s.configured[v] = true
			s.secrets = append(s.secrets, v)
		}
	}
}

const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	closeGrace    = 2 * time.Second
)

// Start listens on a loopback address such as "127.0.0.1:0" with plain HTTP.
func (s *Server) Start(addr string) error {
	u, err := s.listen(addr, nil)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.url = u
	s.mu.Unlock()
	return nil
}

// URL is the origin of the plain listener, without a slash at the end; of the TLS listener if
// only that was started; "" before.
func (s *Server) URL() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.url == "" {
		return s.tlsURL
	}
	return s.url
}

// TLSURL is the origin of the TLS listener, "" before StartTLS.
func (s *Server) TLSURL() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tlsURL
}

func (s *Server) listen(addr string, cert *certificate) (string, error) {
	if s.err != nil {
		return "", s.err
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return "", err
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return "", fmt.Errorf("address %q is not of this machine: want 127.0.0.1:port or [::1]:port", addr)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return "", http.ErrServerClosed
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return "", err
	}
	// Handshake failures and dropped connections are part of the game: nobody reads them.
	hs := &http.Server{Handler: s, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, ErrorLog: log.New(io.Discard, "", 0)}
	s.servers = append(s.servers, hs)
	scheme := "http"
	serve := func() error { return hs.Serve(ln) }
	if cert != nil {
		scheme = "https"
		hs.TLSConfig = cert.config()
		serve = func() error { return hs.ServeTLS(ln, "", "") }
	}
	if len(s.servers) == 1 && s.cfg.TicketEvery > 0 {
		for appID := range s.platforms {
			s.wg.Go(func() { s.pushTickets(appID) })
		}
	}
	s.wg.Go(func() { _ = serve() }) // ends with ErrServerClosed
	return scheme + "://" + ln.Addr().String(), nil
}

// pushTickets pushes tickets until Close.
func (s *Server) pushTickets(platformID string) {
	every := time.NewTicker(s.cfg.TicketEvery)
	defer every.Stop()
	for {
		s.mu.Lock()
		p := s.platforms[platformID]
		ready := p.EventURL != "" && !p.stopped
		s.mu.Unlock()
		if ready {
			_, _ = s.PushTicket(s.ctx, platformID) // the journal has the outcome
		}
		select {
		case <-every.C:
		case <-s.ctx.Done():
			return
		}
	}
}

// Close stops listening, drops pushes in flight and waits for everything to end.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	servers := s.servers
	s.servers = nil
	s.mu.Unlock()
	s.cancel()
	ctx, cancel := context.WithTimeout(context.Background(), closeGrace)
	defer cancel()
	for _, hs := range servers {
		if hs.Shutdown(ctx) != nil {
			_ = hs.Close()
		}
	}
	s.wg.Wait()
	s.pushing.CloseIdleConnections()
}

// Journal is the record of all that the server saw and sent.
func (s *Server) Journal() *Journal { return s.journal }

// SetURLs tells where a platform receives events and messages; an empty one is left as it is.
func (s *Server) SetURLs(platformAppID, eventURL, messageURL string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.platforms[platformAppID]
	if p == nil {
		return
	}
	if eventURL != "" {
		p.EventURL = eventURL
	}
	if messageURL != "" {
		p.MessageURL = messageURL
	}
}

// SetMessageURL tells where a plain account receives messages.
func (s *Server) SetMessageURL(accountAppID, messageURL string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.accounts[accountAppID]; a != nil {
		a.MessageURL = messageURL
	}
}

// SetOAuthHosts replaces Config.OAuthHosts.
func (s *Server) SetOAuthHosts(hosts ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cfg.OAuthHosts = slices.Clone(hosts)
}

// SetClock puts WeChat's clock ahead of this machine's, or behind it: by it are the Date of answers and the times of pushes. What is issued lives
// as long as before.
func (s *Server) SetClock(ahead time.Duration) { s.ahead.Store(int64(ahead)) }

// now is the time by WeChat's clock.
func (s *Server) now() time.Time { return time.Now().Add(time.Duration(s.ahead.Load())) }

// SetPushKeys changes the push token and EncodingAESKey of a platform or plain account, as the
// console does (key rotation). Replies to pushes under way are still judged by the old ones.
func (s *Server) SetPushKeys(appID, token, aesKey string) error {
	crypt, err := NewCrypt(token, aesKey, appID)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p, a := s.platforms[appID], s.accounts[appID]
	switch {
	case p != nil && crypt.block != nil:
		p.Token, p.AESKey, p.crypt = token, aesKey, crypt
	case a != nil && a.plain && (crypt.block != nil || a.Mode == ModePlain):
		a.Token, a.AESKey, a.crypt = token, aesKey, crypt
	default:
		return fmt.Errorf("%s is no platform or account that can have these keys", appID)
	}
	s.keep(token, aesKey)
	return nil
}

// SetSecret resets the AppSecret of a platform or plain account; the old one is dead at once.
func (s *Server) SetSecret(appID, secret string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.platforms[appID]; p != nil {
		p.Secret = secret
	}
	if a := s.accounts[appID]; a != nil && a.plain {
		a.Secret = secret
	}
	s.keep(secret)
}

var _ http.Handler = (*Server)(nil)
