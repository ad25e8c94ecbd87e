// Command demo shows the gateway at work without a WeChat account: it starts a simulated WeChat, a legacy backend that
// only knows plaintext XML, and the real gateway from Caddyfile.example, shows each job as it happens, and stays up
// for trying it by hand. `make run` builds and runs it. With -release-check it rehearses WeChat's acceptance check
// instead, which `make release-check` runs.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

func main() {
	binary := flag.String("caddy", "bin/caddy", "the gateway's binary")
	config := flag.String("config", "Caddyfile.example", "its configuration")
	dir := flag.String("dir", ".run/demo", "the folder to which everything is written; emptied first")
	once := flag.Bool("once", false, "end after the show")
	check := flag.Bool("release-check", false, "go through WeChat's release check, with the demo that runs in -dir or else with a gateway of its own")
	flag.Parse()
	// A terminal that is closed and a reader that has gone end it in good order too, or its gateway would stay. The latter cannot be
	// told by SIGPIPE, which also says that somebody has left a connection.
	endings := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup
		endings = append(endings, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), endings...)
	defer stop()
	signal.Ignore(syscall.SIGPIPE)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out := &output{os.Stdout, cancel}
	if *check {
		if err := rehearse(ctx, *binary, *config, *dir, out); err != nil {
			fmt.Fprintln(os.Stderr, "release-check:", err)
			stop()
			os.Exit(1) //nolint:gocritic // stopped above
		}
		return
	}
	if err := run(ctx, *binary, *config, *dir, *once, out); err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
}

// output is what is shown, until nobody takes it any more.
type output struct {
	io.Writer
	gone func() // called when a write fails
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.Writer.Write(p)
	if err != nil {
		o.gone()
	}
	return n, err
}

func run(ctx context.Context, binary, config, dir string, once bool, out io.Writer) (err error) {
	release, err := takeRunFolder(dir)
	if err != nil {
		return err
	}
	defer release()
	binary, err = filepath.Abs(binary)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(dir, "gateway.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	w := &integration.World{
		Binary: binary, Dir: dir, Caddyfile: config, Log: log,
		Ports: map[string]string{"https": "127.0.0.1:8443", "http": "127.0.0.1:8080", "api": "127.0.0.1:8090", "console": "127.0.0.1:2020", "admin": "127.0.0.1:2019"},
		// Pushes come as awkwardly as from WeChat; only what would make two runs of the show differ is off.
		Config: wxsim.Config{Ask: true, Faults: wxsim.Faults{
			DuplicatePushes: -1, RepeatedTickets: -1, StaleTickets: -1, LostAnswers: -1, SlowAnswers: -1, EarlyDeath: -1,
		}},
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	_, _ = fmt.Fprintln(out, "starting a simulated WeChat, a legacy backend, and the gateway from", config)
	if err := w.Start(ctx); err != nil {
		return cmp.Or(ctx.Err(), err) // what is ended fails in all kinds of ways
	}
	s := &show{world: w, out: out}
	if err := s.all(ctx); err != nil {
		return cmp.Or(ctx.Err(), err)
	}
	if once {
		return nil
	}
	uncontrol, err := control(w, dir)
	if err != nil {
		return err
	}
	defer uncontrol()
	s.invite()
	select {
	case <-ctx.Done():
		_, _ = fmt.Fprintln(out, "\nending")
		return nil
	case <-w.Gateway.Exited():
		return fmt.Errorf("the gateway ended:\n%s", w.Gateway.Log())
	}
}
