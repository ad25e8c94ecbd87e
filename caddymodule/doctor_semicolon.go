package caddymodule

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// checkSemicolons looks for semicolons at the ends of values in which one may stand, as far as the grammar goes: whoever is used to another
// server's config ends each line with one.
func (c *doctorConfig) checkSemicolons() (results []doctorResult) {
	take := texts("take it out: a line of a Caddyfile ends without one", "请去掉：Caddyfile 的行尾不写分号")
	say := func(subject, en, zh string) {
		if !slices.ContainsFunc(results, func(r doctorResult) bool { return r.Subject == subject }) {
			results = append(results, redOf(subject, texts(en, zh), take))
		}
	}
	upstream := func(dial string) {
		if strings.HasPrefix(dial, "unix") && strings.Contains(dial, "/") { // in a file's name both may stand
			if strings.HasSuffix(dial, ";") {
				say("upstream "+dial, "it ends in a semicolon, which would be part of the socket's name", "以分号结尾，分号会成为套接字文件名的一部分")
			}
			return
		}
		if strings.ContainsFunc(dial, isMistyped) {
			say("upstream "+dial, "it has a semicolon or punctuation of an input method in it: no backend has such an address", "含有分号或全角标点：后端不会有这样的地址")
		}
	}
	target := func(name, url string) {
		if strings.HasSuffix(url, ";") {
			say(name+" "+url, "it ends in a semicolon, which would be part of the address that visitors are sent to", "以分号结尾，分号会成为访客跳转地址的一部分")
		}
	}
	for _, dial := range c.upstreams {
		upstream(dial)
	}
	if strings.HasSuffix(c.app.Spill, ";") {
		say("spill "+c.app.Spill, "the folder ends in a semicolon, which would be part of its name", "文件夹以分号结尾，分号会成为其名称的一部分")
	}
	for _, client := range c.app.Clients {
		if client != nil && slices.ContainsFunc(client.Keys, func(key string) bool { return strings.HasSuffix(key, ";") }) {
			results = append(results, yellowOf("client "+client.Name, texts("a key of it ends in a semicolon, which is part of the key", "有 key 以分号结尾，分号是 key 的一部分"), take))
		}
	}
	for i := range c.sites {
		for _, h := range c.sites[i].handlers {
			var fields struct {
				Then    string            `json:"then"`
				Funcs   []*Func           `json:"funcs"`
				Folder  string            `json:"folder"`
				Files   map[string]string `json:"files"`
				Mirrors []struct {
					Upstreams []struct {
						Dial string `json:"dial"`
					} `json:"upstreams"`
				} `json:"mirrors"`
			}
			if json.Unmarshal(h.fields, &fields) != nil {
				continue
			}
			target("then", fields.Then)
			for _, f := range fields.Funcs {
				if f != nil {
					target("func "+f.Key, f.Prefix)
				}
			}
			if strings.HasSuffix(fields.Folder, ";") {
				say("folder "+fields.Folder, fmt.Sprintf("the folder of %s ends in a semicolon, which would be part of its name", h.name), fmt.Sprintf("%s 的文件夹以分号结尾，分号会成为其名称的一部分", h.name))
			}
			for _, name := range slices.Sorted(maps.Keys(fields.Files)) {
				if strings.HasSuffix(fields.Files[name], ";") {
					say("file "+name, "its content ends in a semicolon, which WeChat's has not", "内容以分号结尾，而微信给出的没有")
				}
			}
			for _, m := range fields.Mirrors {
				for _, u := range m.Upstreams {
					upstream(u.Dial)
				}
			}
		}
	}
	return results
}
