package wxsim

import (
	"bytes"
	"fmt"
	"html/template"
	"net/http"
)

// choicePath is where the buttons of a page that asks lead.
const choicePath = "/wxsim/choice"

// choice is a button, and where WeChat sends whoever presses it. It may be pressed again, after going back.
type choice struct {
	label string
	take  func() (callback string, err *PageError)
}

var askTemplate = template.Must(template.New("ask").Parse(`<!doctype html>
<html lang="zh-CN">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>WeChat (simulated)</title>
<link rel="icon" href="data:,">
<style>body { font: 18px/2 sans-serif; text-align: center; padding-top: 20vh } a { margin: 0 1rem }</style>
</head>
<body>
<h1>微信（模拟）</h1>
{{- if .Err}}
<p class="error">{{if .Err.Code}}{{.Err.Code}} {{end}}{{.Err.Text}}</p>
{{- end}}
<p>{{range .Choices}}<a href="{{.Address}}">{{.Label}}</a>{{end}}</p>
</body>
</html>
`))

type button struct{ Label, Address string }

// ask answers with a page that has choices, unless check finds that WeChat would show something else.
func (c *call) ask(check func() *PageError, choices ...choice) answer {
	if err := check(); err != nil {
		return c.errorPage(err)
	}
	var buttons []button
	c.s.mu.Lock()
	for _, one := range choices {
		id := randomText(22)
		c.s.choices[id] = one
		buttons = append(buttons, button{one.label, choicePath + "?id=" + id})
	}
	c.s.mu.Unlock()
	return page(nil, buttons)
}

// choose is the press of a button.
func (c *call) choose() answer {
	c.s.mu.Lock()
	one, ok := c.s.choices[c.query.Get("id")]
	c.s.mu.Unlock()
	if !ok {
		return c.errorPage(&PageError{0, "no such button"})
	}
	return c.sendOn(one.take())
}

// sendOn sends a browser on, or says on a page of WeChat's own why not.
func (c *call) sendOn(callback string, err *PageError) answer {
	if err != nil {
		return c.errorPage(err)
	}
	return answer{status: http.StatusFound, location: callback, contentType: htmlContentType}
}

func (c *call) errorPage(err *PageError) answer {
	c.note("%s", err.Error())
	return page(err, nil)
}

func page(err *PageError, buttons []button) answer {
	var b bytes.Buffer
	if err := askTemplate.Execute(&b, struct {
		Err     *PageError
		Choices []button
	}{err, buttons}); err != nil {
		panic(fmt.Sprintf("a page that does not depend on anything outside: %v", err))
	}
	return answer{contentType: htmlContentType, body: b.Bytes()}
}
