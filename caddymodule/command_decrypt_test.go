package caddymodule

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http/httputil"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/spf13/cobra"
)

// commandSecrets are what no command may ever show.
var commandSecrets = []string{
	platformToken, platformKey, platformOldKey, otherToken, otherKey, accountToken, accountKey, "platform-secret", "account-secret", "crm-key-0123456789",
}

// runCommand runs a command and returns what it said, after looking for secrets in it. Code is the exit code.
func runCommand(t *testing.T, cmd *cobra.Command, in []byte, args ...string) (out, talk string, code int, err error) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.SetIn(bytes.NewReader(in))
	cmd.SetOut(&stdout)
	cmd.SetErr(&stderr)
	cmd.SetArgs(args)
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	err = cmd.Execute()
	switch {
	case err == nil:
	case err.Error() == fmt.Sprintf("exiting with status %d", exitFailed):
		code, err = exitFailed, nil
	default:
		code = 1
	}
	for _, text := range []string{stdout.String(), stderr.String(), fmt.Sprint(err)} {
		for _, secret := range commandSecrets {
			if strings.Contains(text, secret) {
				t.Errorf("%q shows a secret:\n%s", args, text)
			}
		}
	}
	return stdout.String(), stderr.String(), code, err
}

// commandConfig writes a config with platforms and accounts; of one of them the keys do not resolve.
func commandConfig(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "caddy.json")
	text := fmt.Sprintf(`{"apps": {"wechat": {
		"platforms": [
			{"appid": %q, "secret": "{env.NO_SUCH_SECRET}", "tokens": [%q, "{env.NO_SUCH_OLD_TOKEN}"], "aes_keys": [%q, %q]},
			{"appid": %q, "secret": "s", "tokens": [%q], "aes_keys": [%q]}
		],
		"accounts": [
			{"appid": %q, "secret": "s", "tokens": [%q], "aes_keys": [%q]},
			{"appid": "wx5555555555555555", "secret": "s"},
			{"appid": "wx6666666666666666", "secret": "s", "tokens": ["{env.NO_SUCH_TOKEN}"]}
		]
	}}}`, platformID, platformToken, platformKey, platformOldKey, otherPlatform, otherToken, otherKey, accountID, accountToken, accountKey)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// captured is a push as a recorder has it: the whole request, its query, its body.
func captured(t *testing.T, s *sender, message string) (whole, query, body string) {
	t.Helper()
	r := s.push("/wx/message/"+authorizerID, message)
	dump, err := httputil.DumpRequest(r, true)
	if err != nil {
		t.Fatal(err)
	}
	_, body, _ = strings.Cut(string(dump), "\r\n\r\n")
	head := strings.Replace(string(dump), "\r\n\r\n", fmt.Sprintf("\r\nContent-Length: %d\r\n\r\n", len(body)), 1)
	return head, r.URL.RawQuery, body
}

const hiddenText = "hidden-in-the-message"

// TestDecrypt: what opens, however it was captured, and what is shown of it.
func TestDecrypt(t *testing.T) {
	t.Parallel()
	config := commandConfig(t)
	message := textMessage(hiddenText)
	whole, query, body := captured(t, platformSender(t), message)
	old, _, _ := captured(t, newSender(t, platformID, platformToken, platformOldKey), message)
	account, _, _ := captured(t, accountSender(t), message)
	asJSON := accountSender(t)
	asJSON.format = 1
	inJSON, _, _ := captured(t, asJSON, `{"MsgType":"event","Event":"CLICK","EventKey":"`+hiddenText+`"}`)
	unix := strings.ReplaceAll(whole, "\r\n", "\n")
	chunked := strings.Replace(whole, "Content-Length: "+fmt.Sprint(len(body)), "Transfer-Encoding: chunked", 1)
	chunked = strings.Replace(chunked, body, fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body), 1)
	for _, tt := range []struct {
		name, in string
		args     []string
		says     []string
	}{
		{"whole", whole, nil, []string{"opened    it opens, and its signature fits", "platform " + platformID + ", token 1 of 1, aes_key 1 of 2", "type      text", "fields    ToUserName FromUserName CreateTime MsgType Content MsgId", "可以解密"}},
		{"whole, with unix lines", unix + "\n", nil, []string{"its signature fits"}},
		{"in chunks", chunked, nil, []string{"its signature fits"}},
		{"chunks put together", strings.Replace(whole, "Content-Length: "+fmt.Sprint(len(body)), "Transfer-Encoding: chunked", 1), nil, []string{"its signature fits"}},
		{"body and query", body, []string{"--url", query}, []string{"its signature fits"}},
		{"body and URL", body, []string{"--url", "https://x.example/wx/message?" + query + "#x"}, []string{"its signature fits"}},
		{"body alone", body, nil, []string{"without the query the signature was not checked"}},
		{"old key", old, nil, []string{"aes_key 2 of 2"}},
		{"account", account, nil, []string{"account " + accountID, "for       " + accountID}},
		{"only of that appid", account, []string{"--appid", accountID}, []string{"account " + accountID}},
		{"json", inJSON, nil, []string{"bytes of json", "type      event CLICK", "fields    MsgType Event EventKey"}},
	} {
		out, talk, code, err := runCommand(t, decryptCommand(), []byte(tt.in), append([]string{"--config", config}, tt.args...)...)
		if code != 0 || err != nil {
			t.Errorf("%s: %d %v\n%s", tt.name, code, err, out)
			continue
		}
		for _, want := range tt.says {
			if !strings.Contains(out, want) {
				t.Errorf("%s: does not say %q:\n%s", tt.name, want, out)
			}
		}
		if strings.Contains(out+talk, hiddenText) || strings.Contains(out+talk, openID) {
			t.Errorf("%s: shows content where nobody asked for it:\n%s", tt.name, out)
		}
		out, talk, _, _ = runCommand(t, decryptCommand(), []byte(tt.in), append([]string{"--config", config, "--plaintext"}, tt.args...)...)
		if !strings.Contains(out, hiddenText) || !strings.Contains(talk, "opened ") || strings.Contains(out, "opened ") {
			t.Errorf("%s: with --plaintext: %q and %q", tt.name, out, talk)
		}
		out, _, _, _ = runCommand(t, decryptCommand(), []byte(tt.in), append([]string{"--config", config, "--json"}, tt.args...)...)
		var d decryption
		if err := json.Unmarshal([]byte(out), &d); err != nil || !d.Opened || d.Verdict != verdictOpened || strings.Contains(out, hiddenText) {
			t.Errorf("%s: with --json: %s %v", tt.name, out, err)
		}
	}
	out, talk, code, err := runCommand(t, decryptCommand(), []byte(whole), "--config", config, "--plaintext")
	if out != message || code != 0 || err != nil {
		t.Errorf("the plaintext is not what was sealed: %q %v", out, err)
	}
	if !strings.Contains(talk, "left out: account wx6666666666666666: token: {env.NO_SUCH_TOKEN} resolves to nothing") {
		t.Errorf("what was left out is not said: %s", talk)
	}
}

// TestDecryptOfPlaintext: what is not encrypted, and the handshake.
func TestDecryptOfPlaintext(t *testing.T) {
	t.Parallel()
	config := commandConfig(t)
	s := accountSender(t)
	stamp := fmt.Sprint(s.at.Unix())
	query := "signature=" + s.codec.Signature(stamp, s.nonce) + "&timestamp=" + stamp + "&nonce=" + s.nonce
	for _, tt := range []struct {
		name, in, query, verdict, what string
		code                           int
	}{
		{"signed", textMessage("x"), query, verdictOpened, accountID, 0},
		{"without a query", textMessage("x"), "", verdictOpened, "", 0},
		{"signed by another", textMessage("x"), strings.Replace(query, "nonce=", "nonce=1", 1), verdictToken, "", exitFailed},
		{"signature missing", textMessage("x"), "timestamp=" + stamp + "&nonce=1", verdictQuery, "", exitFailed},
		{"handshake", "", query + "&echostr=123", verdictOpened, accountID, 0},
		{"handshake, altered", "", strings.Replace(query, "nonce=", "nonce=1", 1) + "&echostr=123", verdictToken, "", exitFailed},
		{"handshake, cut", "", "timestamp=1&nonce=1&echostr=123", verdictQuery, "", exitFailed},
	} {
		args := []string{"--config", config, "--json"}
		if tt.query != "" {
			args = append(args, "--url", "?"+tt.query)
		}
		out, _, code, err := runCommand(t, decryptCommand(), []byte(tt.in), args...)
		var d decryption
		if json.Unmarshal([]byte(out), &d) != nil || d.Verdict != tt.verdict || d.AppID != tt.what || code != tt.code || err != nil {
			t.Errorf("%s: %d %v %s", tt.name, code, err, out)
		}
	}
}

// What is said of a push of a stranger does not steer the terminal.
func TestDecryptShowsNoControls(t *testing.T) {
	t.Parallel()
	in := `{"MsgType":"text\u001b[2J","Event":"e\u009b31m","M\u001b]0;pwn\u0007":"x"}`
	out, talk, _, err := runCommand(t, decryptCommand(), []byte(in), "--config", commandConfig(t))
	if err != nil || !strings.Contains(out+talk, "M]0;pwn") {
		t.Errorf("%v: %s%s", err, out, talk)
	}
	if i := strings.IndexFunc(out+talk, func(r rune) bool { return r != '\n' && unicode.IsControl(r) }); i >= 0 {
		t.Errorf("%q", out+talk)
	}
}

// TestDecryptSaysWhatIsWrong: each thing by itself.
func TestDecryptSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	config := commandConfig(t)
	message := textMessage(hiddenText)
	whole, query, body := captured(t, platformSender(t), message)
	seal := func(id, token, key string) string {
		text, _, _ := captured(t, newSender(t, id, token, key), message)
		return text
	}
	const strangeKey = "ZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZ"
	_, _, otherBody := captured(t, newSender(t, platformID, platformToken, strangeKey), message)
	encrypt := func(change func(string) string) string {
		before, rest, _ := strings.Cut(body, "<Encrypt><![CDATA[")
		text, after, _ := strings.Cut(rest, "]]>")
		return before + "<Encrypt><![CDATA[" + change(text) + "]]>" + after
	}
	param := func(name, value string) string {
		parts := strings.Split(query, "&")
		for i, p := range parts {
			if strings.HasPrefix(p, name+"=") {
				parts[i] = name + "=" + value
			}
		}
		return strings.Join(parts, "&")
	}
	without := func(name string) string {
		return strings.Join(slices.DeleteFunc(strings.Split(query, "&"), func(p string) bool { return strings.HasPrefix(p, name+"=") }), "&")
	}
	zeros := strings.Repeat("0", 40)
	for _, tt := range []struct {
		name, in, query, verdict, says string
	}{
		{"token", seal(platformID, "another-token", platformKey), "", verdictToken, "the aes_key of platform " + platformID + " opens it, but its token did not sign it"},
		{"key", seal(platformID, platformToken, strangeKey), "", verdictKey, "the token of platform " + platformID + " signed it, but no aes_key opens it"},
		{"receive id", seal(strangerID, platformToken, platformKey), "", verdictReceiveID, "but it was encrypted for " + strangerID},
		{"both", seal(platformID, "another-token", strangeKey), "", verdictStranger, "neither a token nor an aes_key fits"},
		{"mixed", seal(platformID, otherToken, platformKey), "", verdictMixed, "the token is that of platform " + otherPlatform},
		{"nonce altered", body, param("nonce", "1"), verdictToken, "so too if timestamp, nonce and the signatures were altered"},
		{"msg_signature altered", body, param("msg_signature", zeros), verdictQuery, "but not msg_signature"},
		{"signature altered", body, param("signature", zeros), verdictQuery, "but signature does not"},
		{"msg_signature missing", body, without("msg_signature"), verdictQuery, "the query lacks msg_signature"},
		{"all missing", body, "encrypt_type=aes", verdictQuery, "the query lacks timestamp, nonce, msg_signature"},
		{"msg_signature cut", body, param("msg_signature", "abc"), verdictQuery, "msg_signature has 3 characters"},
		{"timestamp in milliseconds", body, param("timestamp", "1700000000000"), verdictQuery, "timestamp is not ten digits"},
		{"twice", body, query + "&nonce=1", verdictQuery, "nonce is there twice"},
		{"out of a page", body, strings.ReplaceAll(query, "&", "&amp;"), verdictQuery, "&amp;"},
		{"wrong escape", body, query + "&x=%zz&nonce=%", verdictQuery, "not escaped rightly"},
		{"another push's body", otherBody, query, verdictBody, "body and query are of different pushes"},
		{"body cut", whole[:len(whole)-100], "", verdictBody, "100 of the"},
		{"not the end", body[:len(body)-10], query, verdictBody, "syntax error or cut short"},
		{"a page", "<html><body>x</body></html>", query, verdictBody, "root element is not <xml>"},
		{"text", "hello", "", verdictBody, "neither XML nor a JSON object"},
		{"spaces", encrypt(func(s string) string { return " " + s[1:] }), query, verdictBase64, "spaces"},
		{"lines", encrypt(func(s string) string { return s[:40] + "\n" + s[40:] }), query, verdictBase64, "line breaks"},
		{"escaped", encrypt(func(s string) string { return s[:40] + "%2B" + s[41:] }), query, verdictBase64, "percent-escaped"},
		{"of URLs", encrypt(func(s string) string { return s[:40] + "-" + s[41:] }), query, verdictBase64, "of URLs"},
		{"characters missing", encrypt(func(s string) string { return s[4:] }), query, verdictBase64, "cut or altered"},
		{"without a query and a key", otherBody, "", verdictKey, "it is not known whether a token fits"},
	} {
		args := []string{"--config", config}
		if tt.query != "" {
			args = append(args, "--url", tt.query)
		}
		out, _, code, err := runCommand(t, decryptCommand(), []byte(tt.in), append(args, "--plaintext")...)
		if code != exitFailed || err != nil || !strings.Contains(out, "wrong     "+tt.verdict+"\n") || !strings.Contains(out, tt.says) || !strings.Contains(out, "处理") {
			t.Errorf("%s: %d %v, want %s %q\n%s", tt.name, code, err, tt.verdict, tt.says, out)
		}
		if strings.Contains(out, hiddenText) {
			t.Errorf("%s: shows content of what does not open", tt.name)
		}
		out, _, code, _ = runCommand(t, decryptCommand(), []byte(tt.in), append(args, "--json")...)
		var d decryption
		if json.Unmarshal([]byte(out), &d) != nil || d.Verdict != tt.verdict || d.Opened || d.Remedy == nil || d.Remedy.ZH == "" || code != exitFailed {
			t.Errorf("%s: --json: %d %s", tt.name, code, out)
		}
	}
}

// secretFile writes a secret into a file and returns the flag's value.
func secretFile(t *testing.T, text string) string { t.Helper(); return moveKeyFile(t, text) }

// TestCommandKeys: where keys come from, and what is refused.
func TestCommandKeys(t *testing.T) {
	t.Parallel()
	config := commandConfig(t)
	whole, _, _ := captured(t, platformSender(t), textMessage("x"))
	token, key := secretFile(t, platformToken), secretFile(t, platformKey)
	broken := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(broken, []byte("POST /wx/message HTTP/1.1\r\nnot a header\r\n\r\nx"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		err  string
	}{
		{[]string{"--token", token, "--aes-key", key, "--appid", platformID}, ""},
		{[]string{"--token", secretFile(t, "older"), "--token", token, "--aes-key", key, "--appid", platformID}, ""},
		{[]string{"--token", "visible", "--appid", platformID}, "a secret on the command line is seen by others and stays in the shell's history: write it into a file and give --token @file"},
		{[]string{"--token", token, "--aes-key", "visible", "--appid", platformID}, "give --aes-key @file"},
		{[]string{"--token", token, "--aes-key", key}, "--token needs --appid"},
		{[]string{"--aes-key", key}, "--aes-key needs --token"},
		{[]string{"--token", token, "--appid", platformID, "--config", config}, "two sources of keys"},
		{[]string{"--token", "@/nonexistent/token", "--appid", platformID}, "/nonexistent/token"},
		{[]string{"--token", secretFile(t, ""), "--appid", platformID}, "is empty"},
		{[]string{"--token", token, "--aes-key", token, "--appid", platformID}, "aes key has 14 characters, want the 43"},
		{[]string{"--token", secretFile(t, strings.Repeat("x", maxKeyFile)), "--appid", platformID}, "this is no file with a secret"},
		{[]string{"--config", config, "--appid", "x"}, "'x' is not an appid"},
		{[]string{"--config", config, "--appid", strangerID}, "has no push keys in"},
		{[]string{"--config", config, "--appid", "wx6666666666666666"}, "{env.NO_SUCH_TOKEN} resolves to nothing"},
		{[]string{"--config", "/nonexistent/Caddyfile"}, "/nonexistent/Caddyfile"},
		{[]string{"--config", config, "/nonexistent/push"}, "/nonexistent/push"},
		{[]string{"--config", config, "--url", "x=1"}, "the captured request has a query already"},
		{[]string{"--config", config, broken}, "it begins like an HTTP request, and is none"},
		{[]string{"a", "b"}, "at most 1 arg"},
	} {
		out, _, code, err := runCommand(t, decryptCommand(), []byte(whole), tt.args...)
		if tt.err == "" {
			if code != 0 || !strings.Contains(out, "opened") {
				t.Errorf("%q: %d %v %s", tt.args, code, err, out)
			}
			continue
		}
		if code != 1 || !strings.Contains(fmt.Sprint(err), tt.err) {
			t.Errorf("%q: %d %v, want %q", tt.args, code, err, tt.err)
		}
		if strings.Contains(fmt.Sprint(err), "visible") {
			t.Errorf("%q: repeats the secret", tt.args)
		}
	}
	for in, want := range map[string]string{"": "nothing to open", strings.Repeat("x", maxCapture+1): "this is no push"} {
		if _, _, code, err := runCommand(t, decryptCommand(), []byte(in), "--config", config); code != 1 || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%d %v, want %q", code, err, want)
		}
	}
	if _, _, code, err := runCommand(t, decryptCommand(), []byte("<xml/>"), "--config", config, "--url", "https://x.example/"); code != 1 || !strings.Contains(fmt.Sprint(err), "no query in it") {
		t.Errorf("%d %v", code, err)
	}
}

// TestCommandCompletion: a shell is offered appids of the config, and files behind an @.
func TestCommandCompletion(t *testing.T) {
	t.Parallel()
	config := commandConfig(t)
	folder := t.TempDir()
	for _, name := range []string{"token", "tokens.d/x", "key"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(folder, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(folder, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	null := filepath.Join(folder, "null.json")
	writeFile(t, null, `{"apps":{"wechat":{"platforms":[null]}}}`)
	for _, tt := range []struct {
		args []string
		says []string
	}{
		{[]string{"--config", null, "--appid", "wx"}, []string{":4"}},
		{[]string{"--config", config, "--appid", "wx"}, []string{platformID + "\tplatform", accountID + "\taccount"}},
		{[]string{"--config", config, "--token", "@" + folder + "/tok"}, []string{"@" + folder + "/token\n", "@" + folder + "/tokens.d/\n"}},
		{[]string{"--aes-key", "@" + folder + "/k"}, []string{"@" + folder + "/key\n"}},
		{[]string{"--config", "/nonexistent/x", "--appid", ""}, []string{":4"}},
	} {
		// As a shell asks: the command is below its root.
		root := &cobra.Command{Use: "wechat"}
		root.AddCommand(decryptCommand())
		out, _, _, err := runCommand(t, root, nil, append([]string{cobra.ShellCompRequestCmd, "decrypt"}, tt.args...)...)
		if err != nil {
			t.Errorf("%q: %v", tt.args, err)
		}
		for _, want := range tt.says {
			if !strings.Contains(out, want) {
				t.Errorf("%q: does not offer %q:\n%s", tt.args, want, out)
			}
		}
	}
}
