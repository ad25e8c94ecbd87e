package integration_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
)

// labels are a Kubernetes object's.
type labels = map[string]string

// manifest is what TestKubernetes holds against each other in contrib/kubernetes.yaml.
type manifest struct {
	Kind     string
	Metadata struct{ Name string }
	Data     map[string]string // of a ConfigMap
	Spec     struct {
		Selector    map[string]any // of a Service: labels; else with matchLabels
		PodSelector struct {
			MatchLabels labels `yaml:"matchLabels"`
		} `yaml:"podSelector"`
		Template struct {
			Metadata struct{ Labels labels }
			Spec     struct {
				Grace           int `yaml:"terminationGracePeriodSeconds"`
				SecurityContext struct {
					User int `yaml:"runAsUser"`
				} `yaml:"securityContext"`
				Containers []struct {
					Ports []struct {
						Name          string
						ContainerPort int `yaml:"containerPort"`
					}
					Readiness struct {
						TCP struct{ Port string } `yaml:"tcpSocket"`
					} `yaml:"readinessProbe"`
					Mounts []struct {
						Name string
						Path string `yaml:"mountPath"`
					} `yaml:"volumeMounts"`
				}
				Volumes []struct {
					Name      string
					ConfigMap struct{ Name string } `yaml:"configMap"`
				}
			}
		}
		Claims []struct{ Metadata struct{ Name string } } `yaml:"volumeClaimTemplates"`
		Ports  []struct {
			Name   string
			Target string `yaml:"targetPort"`
		} // of a Service
		Ingress []struct{ Ports []struct{ Port string } } // of a NetworkPolicy
		Rules   []struct {
			HTTP struct {
				Paths []struct {
					Backend struct {
						Service struct {
							Name string
							Port struct{ Name string }
						}
					}
				}
			}
		} // of an Ingress
	}
}

// manifests are the objects of contrib/kubernetes.yaml, by kind and name.
func manifests(t *testing.T) map[string]manifest {
	t.Helper()
	all := make(map[string]manifest)
	decoder := yaml.NewDecoder(strings.NewReader(document(t, "contrib/kubernetes.yaml")))
	for {
		var m manifest
		err := decoder.Decode(&m)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all[m.Kind+" "+m.Metadata.Name] = m
	}
}

// TestKubernetesObjects: what the objects say of each other and of the image is so.
func TestKubernetesObjects(t *testing.T) {
	t.Parallel()
	all := manifests(t)
	const name = "caddy-wechat"
	config, pods := all["ConfigMap "+name], all["StatefulSet "+name].Spec
	if config.Data == nil || len(pods.Template.Spec.Containers) != 1 {
		t.Fatal("there is no configuration, or not one container")
	}
	same := func(what string, got any) {
		t.Helper()
		want, _ := json.Marshal(pods.Template.Metadata.Labels)
		if got, err := json.Marshal(got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s selects %s, the Pods have %s", what, got, want)
		}
	}
	same("the StatefulSet", pods.Selector["matchLabels"])
	same("the PodDisruptionBudget", all["PodDisruptionBudget "+name].Spec.Selector["matchLabels"])
	same("the NetworkPolicy", all["NetworkPolicy "+name].Spec.PodSelector.MatchLabels)
	container := pods.Template.Spec.Containers[0]
	var ports []string
	for _, p := range container.Ports {
		ports = append(ports, p.Name)
		if want := fmt.Sprintf(":%d {\n", p.ContainerPort); p.Name != "web" && !strings.Contains(config.Data["Caddyfile"], want) {
			t.Errorf("no site of the Caddyfile is at port %d", p.ContainerPort)
		}
		if p.Name == "web" && !strings.Contains(config.Data["Caddyfile"], fmt.Sprintf("\thttp_port %d\n", p.ContainerPort)) {
			t.Errorf("the Caddyfile's http_port is not %d", p.ContainerPort)
		}
	}
	if !slices.Contains(ports, container.Readiness.TCP.Port) {
		t.Errorf("the probe is at %q of %q", container.Readiness.TCP.Port, ports)
	}
	reached := make(map[string]bool)
	for _, service := range []string{name, name + "-api"} {
		s := all["Service "+service].Spec
		same("the Service "+service, s.Selector)
		for _, p := range s.Ports {
			if !slices.Contains(ports, p.Target) {
				t.Errorf("%s leads to %q of %q", service, p.Target, ports)
			}
			reached[service+" "+p.Name] = true
		}
	}
	for _, rule := range all["NetworkPolicy "+name].Spec.Ingress {
		for _, p := range rule.Ports {
			if i := slices.Index(ports, p.Port); i < 0 {
				t.Errorf("the NetworkPolicy lets %q pass twice, or there is none", p.Port)
			} else {
				ports = slices.Delete(ports, i, i+1)
			}
		}
	}
	if len(ports) > 0 {
		t.Errorf("the NetworkPolicy lets nothing pass to %q", ports)
	}
	for _, p := range all["Ingress "+name].Spec.Rules[0].HTTP.Paths {
		if b := p.Backend.Service; !reached[b.Name+" "+b.Port.Name] {
			t.Errorf("the Ingress leads to %v", b)
		}
	}
	image := document(t, "contrib/Dockerfile")
	volumes := make(map[string]bool)
	for _, v := range pods.Template.Spec.Volumes {
		volumes[v.Name] = true
		if v.ConfigMap.Name != "" && v.ConfigMap.Name != name {
			t.Errorf("volume %s is of the ConfigMap %q", v.Name, v.ConfigMap.Name)
		}
	}
	for _, c := range pods.Claims {
		volumes[c.Metadata.Name] = true
	}
	for _, m := range container.Mounts {
		if !volumes[m.Name] || !strings.Contains(image, m.Path+`/Caddyfile"`) && !strings.Contains(image, "="+m.Path+" ") && !strings.Contains(image, "="+m.Path+"\n") {
			t.Errorf("%v is no volume, or nothing that the image uses", m)
		}
	}
	if len(container.Mounts) != 3 || !strings.Contains(image, fmt.Sprintf("\nUSER %d:", pods.Template.Spec.SecurityContext.User)) {
		t.Errorf("mounts %v, user %d", container.Mounts, pods.Template.Spec.SecurityContext.User)
	}
	// shutdown_delay, and what the unit gives a process.
	if want := 10 + 45; pods.Template.Spec.Grace != want || !strings.Contains(config.Data["Caddyfile"], "\tshutdown_delay 10s\n\tgrace_period 10s\n") {
		t.Errorf("a Pod gets %d s to end", pods.Template.Spec.Grace)
	}
}

// TestKubernetesPod runs a Pod's gateway, with a site in the Ingress's place, and ends it.
func TestKubernetesPod(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, "--requirepass", "redis-password")
	text := manifests(t)["ConfigMap caddy-wechat"].Data["Caddyfile"]
	replace := func(old, with string) {
		t.Helper()
		if strings.Count(text, old) != 1 {
			t.Fatalf("kubernetes.yaml has %q %d times:\n%s", old, strings.Count(text, old), text)
		}
		text = strings.ReplaceAll(text, old, with)
	}
	ops, err := integration.FreeAddr("")
	if err != nil {
		t.Fatal(err)
	}
	replace("\thttp_port 8080\n", "\thttp_port {$WECHAT_HTTP_PORT}\n\thttps_port {$WECHAT_HTTPS_PORT}\n\tadmin {$WECHAT_ADMIN}\n\tskip_install_trust\n\tlog {\n\t\tlevel DEBUG\n\t}\n")
	replace("\tshutdown_delay 10s\n\tgrace_period 10s\n", "\tshutdown_delay 4s\n\tgrace_period 2s\n")
	replace("\t\tseal_key", "\t\tapi {$WECHAT_API}\n\t\topen {$WECHAT_OPEN}\n\t\tseal_key")
	replace("legacy:8080", "{$WECHAT_BACKEND}")
	replace("\nhttp://:8090 {\n", "\nhttp://:{$WECHAT_API_PORT} {\n")
	replace("\nhttp://:2020 {\n", "\nhttp://:{$WECHAT_CONSOLE_PORT} {\n")
	replace("\nhttp://:8081 {\n", "\nhttp://:"+integration.Port(ops)+" {\n\tbind 127.0.0.1\n")
	text += "\nlocalhost {\n\ttls internal\n\treverse_proxy 127.0.0.1:{$WECHAT_HTTP_PORT} {\n\t\theader_up Host wechat.example.com\n\t}\n}\n"
	file := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Caddyfile = file
		w.Env = append(w.Env, "REDIS_ADDRESS="+server.Addr, "REDIS_PASSWORD=redis-password")
	})
	authorize(t, w)
	if resp, body := fetch(t, httpsClient(t, w), http.MethodGet, w.URL("/wx/authorize"), nil, ""); resp.StatusCode >= http.StatusBadRequest {
		t.Errorf("the owners' page: %d %s", resp.StatusCode, body)
	}
	says := func() {
		t.Helper()
		result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "pod"})
		if err != nil || result.UserSaw != "收到：pod" {
			t.Errorf("push: %q %s %v", result.UserSaw, result.Wrong, err)
		}
		if status, body := call(t, w, http.MethodGet, "/"+integration.AuthorizerID+"/cgi-bin/getcallbackip", bearer(w), ""); status != http.StatusOK || !strings.Contains(body, "ip_list") {
			t.Errorf("call: %d %s", status, body)
		}
	}
	says()
	if resp, body := fetch(t, plainClient, http.MethodGet, "http://"+ops+"/metrics", nil, ""); resp.StatusCode != http.StatusOK || !strings.Contains(body, "caddy_wechat_pushes_total{") {
		t.Errorf("metrics: %d", resp.StatusCode)
	}
	if resp, body := fetch(t, plainClient, http.MethodGet, "http://"+w.Console+"/", nil, ""); resp.StatusCode != http.StatusOK || !strings.Contains(body, "<html") {
		t.Errorf("console: %d %s", resp.StatusCode, body)
	}
	told, stopped := time.Now(), make(chan error, 1)
	go func() { stopped <- w.Gateway.Stop() }()
	eventually(t, "the Pod is not ready", func() error {
		if resp, _ := fetch(t, plainClient, http.MethodGet, "http://"+ops+"/ready", nil, ""); resp.StatusCode != http.StatusServiceUnavailable {
			return fmt.Errorf("%d", resp.StatusCode)
		}
		return nil
	})
	says()
	if err := <-stopped; err != nil || time.Since(told) < 4*time.Second {
		t.Errorf("it ended after %v: %v", time.Since(told), err)
	}
	checkViolations(t, w)
}
