"use strict";
(() => {
	const STATUS_EVERY = 5000, FEED_EVERY = 2000, REFUSALS_EVERY = 10000, ACCOUNTS_EVERY = 15000, INDEX_EVERY = 2000; // ms
	const WAIT_AT_MOST = 60000, ANSWER_WITHIN = 12000, CHANGE_WITHIN = 30000, TYPING = 300; // ms
	const PAGE = 50, FEED_LIMIT = 200, FEED_ROUNDS = 10, FEED_ROWS = 300, CARD_ITEMS = 50, LONG_CARD = 8, DOT_MOST = 99, REFUSALS = 100;
	const VIEWS = ["health", "authorizers", "feed", "links", "errors"];
	const APPID = /^wx[0-9a-f]{16}$/;
	const HOLE = "{appid}";

	const $ = id => document.getElementById(id);
	const remember = (name, value) => { try { localStorage.setItem(name, value); } catch { /* private windows keep nothing */ } };
	const recall = name => { try { return localStorage.getItem(name); } catch { return null; } };

	// Language and looks.
	let lang = recall("wechat-console-language");
	if (lang !== "zh" && lang !== "en") lang = (navigator.language || "").toLowerCase().startsWith("zh") ? "zh" : "en";
	let theme = recall("wechat-console-theme");
	if (theme !== "light" && theme !== "dark") theme = "auto";

	const t = (key, values = {}) => (TEXT[lang][key] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
	const pick = text => typeof text === "string" ? text : text ? text[lang] || text.en || text.zh || "" : "";
	const named = key => TEXT[lang][key] || key.replace(/^sign_/, ""); // of a word that the gateway may use and this page not know

	// because says why something was refused or failed.
	function because(reason) {
		if (lang !== "zh" || !reason) return reason || "";
		if (Object.hasOwn(REASONS, reason)) return REASONS[reason];
		const [form, words] = REASON_FORMS.find(([form]) => form.test(reason)) || [];
		return form ? reason.replace(form, words) : reason;
	}

	// whom says what a finding is about: "this machine", or a kind and a name.
	const whom = subject => {
		if (subject === "this machine") return t("subject_machine");
		const [kind, ...name] = subject.split(" ");
		return name.length > 0 ? [TEXT[lang]["subject_" + kind] || kind, ...name].join(" ") : subject;
	};

	// el makes an element. Whatever comes from the gateway is text and nothing else.
	function el(tag, props, ...children) {
		const e = document.createElement(tag);
		for (const [name, value] of Object.entries(props || {})) {
			if (value === undefined || value === null || value === false) continue;
			if (name === "on") e.addEventListener("click", value);
			else if (name === "class") e.className = value;
			else e.setAttribute(name, value === true ? "" : value);
		}
		e.append(...children.flat(Infinity).filter(c => c !== undefined && c !== null && c !== "" && c !== false));
		return e;
	}

	// swap replaces what is in a place. The focus stays with what has the same data-key.
	function swap(place, ...nodes) {
		const focused = place.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
		place.replaceChildren(...nodes.flat(Infinity).filter(n => n !== undefined && n !== null && n !== ""));
		if (focused !== undefined) [...place.querySelectorAll("[data-key]")].find(e => e.dataset.key === focused)?.focus({ preventScroll: true });
	}

	function announce(text) {
		$("announce").textContent = "";
		setTimeout(() => { $("announce").textContent = text; }, 50); // so that the same text is said again
	}

	// Times. Ages are by the gateway's clock, whatever this machine's says.
	let skew = 0;
	const now = () => Date.now() + skew;
	const locale = () => lang === "zh" ? "zh-CN" : "en-GB";
	function ago(time) {
		const seconds = Math.round((Date.parse(time) - now()) / 1000), size = Math.abs(seconds);
		const [unit, by] = size < 60 ? ["second", 1] : size < 3600 ? ["minute", 60] : size < 86400 ? ["hour", 3600] : ["day", 86400];
		return new Intl.RelativeTimeFormat(locale(), { numeric: "always", style: lang === "zh" ? "long" : "short" }).format(Math.min(0, Math.round(seconds / by)), unit);
	}
	function clock(time) {
		const d = new Date(time);
		const sameDay = d.toDateString() === new Date(now()).toDateString();
		return d.toLocaleString(locale(), sameDay ? { hour: "2-digit", minute: "2-digit", second: "2-digit" } : { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
	}
	const timeOf = (time, words) => el("time", { datetime: time, title: new Date(time).toLocaleString(locale()) }, words);
	function lasting(ms) {
		const minutes = Math.floor(ms / 60000);
		const [unit, n] = minutes < 60 ? ["minute", minutes] : minutes < 2880 ? ["hour", Math.floor(minutes / 60)] : ["day", Math.floor(minutes / 1440)];
		return new Intl.NumberFormat(locale(), { style: "unit", unit, unitDisplay: lang === "zh" ? "long" : "short" }).format(Math.max(0, n));
	}
	const count = n => new Intl.NumberFormat(locale()).format(n);
	const took = ms => ms === undefined ? "" : ms < 1000 ? `${ms} ms` : `${(ms / 1000).toFixed(1)} s`;

	// ask calls the gateway.
	class Refused extends Error {
		constructor(status, text) { super(text); this.status = status; }
	}
	async function ask(path, { method = "GET", signal } = {}) {
		const abort = new AbortController(), leave = () => abort.abort();
		let late = false, response, text;
		const timer = setTimeout(() => { late = true; abort.abort(); }, method === "GET" ? ANSWER_WITHIN : CHANGE_WITHIN);
		if (signal?.aborted) leave();
		signal?.addEventListener("abort", leave);
		try {
			const change = method === "GET" ? {} : { headers: { "Content-Type": "application/json" }, body: "{}" };
			response = await fetch("api/" + path, { method, signal: abort.signal, cache: "no-store", redirect: "manual", ...change });
			if (response.type === "opaqueredirect") throw new Refused(401, "redirect"); // to a login
			text = await response.text();
		} catch (err) {
			throw late ? new DOMException("too slow", "TimeoutError") : err;
		} finally {
			clearTimeout(timer);
			signal?.removeEventListener("abort", leave);
		}
		let body = null;
		try { body = JSON.parse(text); } catch { /* a proxy in between may answer with a page */ }
		if (!response.ok) throw new Refused(response.status, typeof body?.error === "string" ? body.error : `HTTP ${response.status}`);
		if (body === null) throw new Refused(401, "not JSON"); // a page, most likely to log in on
		return body;
	}
	const query = values => { const q = new URLSearchParams(); for (const [k, v] of Object.entries(values)) if (v) q.set(k, v); const s = q.toString(); return s ? "?" + s : ""; };
	function why(err) {
		if (err.status === 401 || err.status === 403) return t("denied");
		if (err.status === 404 && /no such operation/.test(err.message)) return t("notAvailable");
		if (err instanceof Refused) return err.message;
		return err.name === "TimeoutError" ? t("why_timeout") : t("why_network");
	}

	// repeat does work again and again while it is wanted and somebody looks; after failures less and less often.
	function repeat(every, work, wanted) {
		let timer = 0, failures = 0, working = false;
		const self = { failures: () => failures, due: 0, now: tick, later: () => { if (!working) { clearTimeout(timer); timer = setTimeout(tick, every); } } };
		async function tick() {
			clearTimeout(timer);
			if (working || document.hidden || !wanted()) return;
			working = true;
			try { await work(); failures = 0; } catch (err) { failures++; self.failed?.(err); }
			working = false;
			const wait = Math.min(WAIT_AT_MOST, every * 2 ** Math.min(failures, 5));
			self.due = Date.now() + wait;
			timer = setTimeout(tick, wait);
		}
		return self;
	}

	// Health.
	let status = null, updated = 0, awayBecause = null;
	const statusLoop = repeat(STATUS_EVERY, async () => {
		const got = await ask("status");
		const was = status;
		status = got;
		updated = Date.now();
		if (got.time) skew = Date.parse(got.time) - Date.now();
		if (awayBecause) { awayBecause = null; announce(t("back")); }
		else if (was && was.level !== got.level) announce(t("level_" + got.level));
		showAway();
		showStatus();
	}, () => true);
	statusLoop.failed = err => {
		const first = awayBecause === null;
		awayBecause = why(err);
		statusLoop.due = 0;
		setTimeout(() => { showAway(); if (first) announce($("away-text").textContent); });
	};

	function showAway() {
		$("away").hidden = awayBecause === null;
		if (awayBecause === null) return;
		const values = { why: awayBecause, s: Math.max(0, Math.ceil((statusLoop.due - Date.now()) / 1000)), at: updated ? new Date(updated).toLocaleTimeString(locale()) : "" };
		$("away-text").textContent = t(updated ? "away" : "awayNew", values);
	}

	function showFresh() {
		showAway();
		$("fresh").textContent = !updated ? "" : awayBecause !== null ? t("stale", { at: new Date(updated).toLocaleTimeString(locale()) })
			: t("fresh", { ago: ago(new Date(updated + skew).toISOString()) });
	}

	const badge = (level, words) => el("span", { class: "badge " + (["green", "yellow", "red"].includes(level) ? level : "") }, words || named("sign_" + level));

	// rows makes a list of names and values, without those that have none.
	function rows(pairs) {
		const list = pairs.filter(([, value]) => value !== undefined && value !== null && value !== "" && !(Array.isArray(value) && value.length === 0))
			.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
		return list.length ? el("dl", {}, list) : null;
	}

	function tokenRows(token) {
		if (!token) return [];
		return [
			[t("token"), token.expires ? timeOf(token.expires, t("tokenUntil", { at: clock(token.expires) })) : token.error ? null : t("none")],
			["", token.refreshed ? el("span", { class: "soft" }, t("refreshed", { ago: ago(token.refreshed) })) : null],
			[t("error"), token.error ? el("span", { class: "red" }, pick(token.error)) : null],
		];
	}

	function card(title, items) {
		if (!items || items.length === 0) return null;
		const more = items.length - CARD_ITEMS;
		return el("section", { class: items.length > LONG_CARD ? "card long" : "card" }, el("div", { class: "head" }, el("h2", {}, title)), items.slice(0, CARD_ITEMS), more > 0 ? el("p", { class: "item soft" }, t("andMore", { n: count(more) })) : null);
	}

	// worst has what is not well come first where not all are shown.
	const worst = list => (list || []).length <= CARD_ITEMS ? list || [] : [...list].sort((a, b) => rank(a.level) - rank(b.level));
	const rank = level => ({ red: 0, yellow: 1 })[level] ?? 2;

	function item(name, level, ...content) {
		return el("div", { class: "item" }, el("div", { class: "head" }, el("h3", {}, el("bdi", {}, name)), level ? badge(level) : null), content);
	}

	// doing makes a button that has the gateway do something, and says how that went.
	const outcomes = new Map();
	function doing(key, label, path, say) {
		const done = outcomes.get(key);
		const button = el("button", { type: "button", class: "small", "data-key": key, disabled: done?.busy, on: async () => {
			if (outcomes.get(key)?.busy) return;
			outcomes.set(key, { busy: true });
			button.setAttribute("aria-disabled", "true");
			let ended;
			try { const got = await ask(path, { method: "POST" }); ended = { text: say(got), class: got.failed?.length ? "yellow" : "green" }; } catch (err) { ended = { text: t("didNot", { why: why(err) }), class: "red" }; }
			outcomes.set(key, ended);
			announce(ended.text);
			showStatus();
			statusLoop.now();
		} }, label);
		if (done?.busy) { button.removeAttribute("disabled"); button.setAttribute("aria-disabled", "true"); }
		return el("div", { class: "acts" }, button, done?.text ? el("span", { class: "soft " + done.class }, done.text) : null);
	}
	const drained = got => t("drained", { done: got.done, tried: got.tried }) + (got.failed || []).map(f => t("notDrained", { appid: f.appid || f.platform, why: pick(f.text) || f.reason })).join("");
	const refreshed = got => t("refreshedUntil", { at: got.expires ? clock(got.expires) : "" });

	function keyRows(keys) {
		return (keys || []).map(k => [
			`${t(k.what === "aes_key" ? "aesKey" : "verifyToken")} (${k.index ? t("older", { n: k.index }) : t("current")})`,
			k.last_used ? timeOf(k.last_used, t("lastUsed", { ago: ago(k.last_used) })) : t("unused"),
		]);
	}

	function showStatus() {
		if (!status) { swap($("summary"), el("p", {}, t("loading"))); return; }
		const s = status, findings = s.findings || [];
		const bad = findings.filter(f => f.level === "red" || f.level === "yellow");
		const level = ["green", "yellow", "red"].includes(s.level) ? s.level : "yellow";
		$("node").textContent = t("node", { node: s.node || location.host, version: s.version || "?", up: s.started ? lasting(now() - Date.parse(s.started)) : "?" });
		$("summary").className = "summary " + level;
		swap($("summary"), el("span", { class: "sign " + level, "aria-hidden": "true" }, { green: "✓", yellow: "!", red: "✕" }[level]),
			el("div", {}, el("strong", { class: level }, t("level_" + level)), el("p", {}, bad.length ? t("countFindings", { n: count(bad.length) }) : level === "green" ? t("well") : "")));
		$("level").hidden = bad.length === 0;
		$("level").className = "dot " + level;
		swap($("level"), el("span", { "aria-hidden": "true" }, bad.length > DOT_MOST ? `${DOT_MOST}+` : count(bad.length)), el("span", { class: "unseen" }, t("countFindings", { n: count(bad.length) })));
		showTitle();
		showPlatforms();
		swap($("findings"), bad.map(f => el("li", { class: f.level },
			el("div", { class: "top" }, badge(f.level), el("strong", {}, pick(f.text)), el("span", { class: "subject" }, el("bdi", {}, whom(f.subject || "")))),
			pick(f.remedy) ? el("p", { class: "remedy" }, el("strong", {}, t("remedy") + (lang === "zh" ? "：" : ": ")), pick(f.remedy)) : null)));

		const store = s.store || {}, pushes = s.pushes || {};
		swap($("cards"),
			card(t("platforms"), worst(s.platforms).map(p => item(p.appid, p.level, rows([
				[t("ticket"), p.ticket?.received ? timeOf(p.ticket.received, ago(p.ticket.received)) : t("never")],
				...tokenRows(p.token), ...keyRows(p.keys),
				[t("releaseCheck"), p.release_check ? p.release_check.last || p.release_check.seen ? t("seen", { ago: p.release_check.last ? ago(p.release_check.last) : "" }).trim() : t("notSeen") : null],
				[t("unexchanged"), p.unexchanged || null], [t("lost"), p.lost || null],
			]), p.unexchanged ? doing("drain " + p.appid, t("drain"), "drain", drained) : null,
			doing("refresh " + p.appid, t("refresh"), "refresh/" + encodeURIComponent(p.appid), refreshed)))),
			card(t("accounts"), worst(s.accounts).map(a => item(a.appid, a.level, rows([[t("mode"), a.mode], ...tokenRows(a.token), [t("lastPush"), a.last_push ? timeOf(a.last_push, ago(a.last_push)) : t("never")]])))),
			card(t("store"), s.store ? [item(store.module || "", store.level, rows([
				[t("state"), store.degraded ? t("degraded") : null], [t("waiting"), store.waiting || null], [t("unsaved"), store.unsaved || null],
				[t("lastError"), store.last_error ? timeOf(store.last_error, ago(store.last_error)) : null],
				[t("error"), store.error ? el("span", { class: "red" }, store.error) : null],
			]))] : []),
			card(t("hosts"), worst(s.hosts).map(h => item(h.host, h.level, rows([
				[t("lastOk"), h.last_ok ? timeOf(h.last_ok, ago(h.last_ok)) : t("never")], [t("lastError"), h.last_error ? timeOf(h.last_error, ago(h.last_error)) : null],
				[t("error"), pick(h.error)], [t("egress"), h.egress_ip],
			])))),
			card(t("backends"), worst(s.backends).map(b => item(b.address, b.level, rows([[t("inFlight"), count(b.in_flight || 0)], [t("fails"), b.fails || null]])))),
			card(t("pushes"), s.pushes ? [el("div", { class: "item" }, rows([[t("inFlight"), count(pushes.in_flight || 0)], [t("lastPush"), pushes.last ? timeOf(pushes.last, ago(pushes.last)) : t("never")]]))] : []),
			card(t("clients"), (s.clients || []).map(c => item(c.name, "", rows([["AppID", (c.appids || []).join(" ")], [t("paths"), (c.paths || []).join(" ")]])))),
		);
	}

	// Authorizers: one page at a time, by the gateway's cursors.
	const accounts = { cursors: [""], at: 0, next: "", list: null, index: null, error: null, abort: null, timer: 0, answer: "" };
	// loadAccounts loads the page again. With keep it is done on the side: it says nothing and leaves what has not changed.
	async function loadAccounts(keep) {
		if (keep && accounts.abort) return;
		clearTimeout(accounts.timer);
		accounts.abort?.abort();
		const abort = accounts.abort = new AbortController();
		const q = $("q").value.trim();
		try {
			const got = await ask("authorizers" + query({ q, platform: $("platform").value, cursor: accounts.cursors[accounts.at], limit: PAGE }), { signal: abort.signal });
			Object.assign(accounts, { list: got.authorizers || [], next: got.next || "", index: q ? got.index : null, error: null });
			if (q && got.index?.state === "building" && view === "authorizers") accounts.timer = setTimeout(() => { if (!document.hidden && view === "authorizers") loadAccounts(true); }, INDEX_EVERY);
			const answer = JSON.stringify(got), same = answer === accounts.answer;
			accounts.answer = answer;
			if (keep && same) return;
		} catch (err) {
			if (abort.signal.aborted || keep && accounts.list?.length) return;
			Object.assign(accounts, { list: [], next: "", index: null, error: err, answer: "" });
		} finally {
			if (accounts.abort === abort) accounts.abort = null;
		}
		showAccounts();
		if (!keep) announce(accounts.error ? why(accounts.error) : accounts.list.length ? t("found", { n: accounts.list.length }) : t("noMatch", { q }));
	}

	const stateBadge = state => badge(state === "authorized" ? "green" : state === "revoked" ? "yellow" : "", named(state || ""));
	const cell = (name, ...content) => el("td", { role: "cell", "data-name": name }, content);

	function showAccounts() {
		const list = accounts.list, q = $("q").value.trim();
		swap($("accounts").tBodies[0], (list || []).map(a => el("tr", { role: "row" },
			cell(t("name"), el("button", { type: "button", class: "link who", "data-key": a.platform + a.appid, title: a.name, on: () => openDrawer(a.appid, a.platform) }, el("bdi", {}, a.name || t("noName")))),
			cell("AppID", el("span", { class: "code" }, a.appid)), cell(t("original"), a.user_name ? el("span", { class: "code" }, a.user_name) : ""),
			cell(t("platform"), el("span", { class: "code" }, a.platform)), cell(t("state"), stateBadge(a.state)))));
		$("accounts").hidden = !list?.length;
		$("accounts-empty").hidden = list?.length > 0;
		$("accounts-empty").textContent = list === null ? t("loading") : accounts.error ? why(accounts.error) : q ? t("noMatch", { q }) : t("noAccounts");
		$("previous").disabled = accounts.at === 0;
		$("next").disabled = !accounts.next;
		$("page").textContent = t("page", { n: count(accounts.at + 1) });
		const index = accounts.index;
		$("index-note").hidden = !index || index.state === "absent";
		if (index) $("index-note").textContent = t(index.state === "building" ? "indexBuilding" : "indexReady", { n: count(index.seen || 0) }) + (index.full ? t("indexFull") : "");
	}

	function restart() { accounts.cursors = [""]; accounts.at = 0; loadAccounts(); }
	const typed = work => { let timer = 0; return () => { clearTimeout(timer); timer = setTimeout(work, TYPING); }; };
	$("q").addEventListener("input", typed(restart));
	$("platform").addEventListener("change", restart);
	$("search").addEventListener("submit", e => { e.preventDefault(); restart(); });
	$("previous").addEventListener("click", () => { if (accounts.at > 0) { accounts.at--; loadAccounts(); } });
	$("next").addEventListener("click", () => { if (accounts.next) { accounts.cursors[++accounts.at] = accounts.next; loadAccounts(); } });

	function showPlatforms() {
		const appids = (status?.platforms || []).map(p => p.appid), chosen = $("platform").value;
		$("platform-field").hidden = appids.length < 2;
		if ($("platform").options.length === appids.length + 1 && $("platform").options[0].text === t("allPlatforms")) return;
		swap($("platform"), el("option", { value: "" }, t("allPlatforms")), appids.map(a => el("option", { value: a }, a)));
		$("platform").value = appids.includes(chosen) ? chosen : "";
	}

	// One account, in a drawer.
	let shown = null;
	async function openDrawer(appid, platform) {
		shown = { appid, platform, detail: null, error: null };
		setDetailStatus("");
		showDetail();
		if (!$("drawer").open) $("drawer").showModal();
		await loadDetail();
		accountsLoop.later();
	}
	async function loadDetail() {
		const mine = shown;
		if (!mine) return;
		try { mine.detail = await ask("authorizers/" + encodeURIComponent(mine.appid) + query({ platform: mine.platform })); mine.error = null; } catch (err) { mine.error = err; }
		if (shown === mine) showDetail();
	}
	function setDetailStatus(text, level) {
		$("detail-status").hidden = !text;
		$("detail-status").className = "note " + (level || "");
		$("detail-status").textContent = text;
	}
	function showDetail() {
		if (!shown) return;
		const d = shown.detail;
		swap($("drawer-title"), el("bdi", {}, d?.name || shown.appid));
		if (!d) { swap($("detail"), el("p", {}, shown.error ? why(shown.error) : t("loading"))); return; }
		const entry = (name, e) => e ? [el("h3", {}, name), entryRows(e)] : [];
		swap($("detail"),
			rows([
				["AppID", el("span", { class: "code" }, d.appid)], [t("original"), d.user_name ? el("span", { class: "code" }, d.user_name) : null],
				[t("platform"), el("span", { class: "code" }, d.platform || "")], [t("state"), stateBadge(d.state)],
				[t("type"), d.type ? t(d.type.mini_program ? "mini" : "official") : null], [t("principal"), d.principal ? el("bdi", {}, d.principal) : null],
				...tokenRows(d.token),
			]),
			d.state === "revoked" ? null : el("div", { class: "acts" }, el("button", { type: "button", "data-key": "refresh", on: refreshShown }, t("refresh"))),
			el("h3", {}, t("permissions")),
			d.permission_sets?.length ? el("ul", { class: "chips" }, d.permission_sets.map(p => el("li", { class: "badge" }, pick(p.name) ? `${pick(p.name)} ` : "", el("span", { class: "soft" }, p.id)))) : el("p", { class: "soft" }, t("noPermissions")),
			entry(t("lastPush"), d.last_push), entry(t("lastCall"), d.last_call), entry(t("lastError"), d.last_error));
	}
	async function refreshShown() {
		const mine = shown;
		if (!mine || mine.busy) return;
		mine.busy = true;
		setDetailStatus(t("refreshing"));
		try {
			const got = await ask("refresh/" + encodeURIComponent(mine.appid) + query({ platform: mine.detail?.platform }), { method: "POST" });
			if (shown === mine) setDetailStatus(refreshed(got), "green");
		} catch (err) { if (shown === mine) setDetailStatus(t("didNot", { why: why(err) }), "red"); }
		mine.busy = false;
		if (shown === mine) loadDetail();
	}
	const accountsLoop = repeat(ACCOUNTS_EVERY, () => Promise.all([view === "authorizers" ? loadAccounts(true) : null, loadDetail()]), () => view === "authorizers" || shown !== null);
	$("close").addEventListener("click", () => $("drawer").close());
	$("drawer").addEventListener("click", e => { if (e.target === $("drawer")) $("drawer").close(); });
	$("drawer").addEventListener("close", () => { shown = null; if (location.hash.startsWith("#authorizers/")) history.replaceState(null, "", "#authorizers"); });

	// Entries of the feed and of the refusals.
	const outcomeLevel = outcome => ({ ok: "green", refused: "yellow", held: "yellow", slow: "yellow", canceled: "yellow", failed: "red" })[outcome] || "";
	const codeLink = code => el("a", { href: "#errors/" + code, "data-key": "code " + code, title: t("explainCode", { code }), on: () => { if ($("drawer").open) $("drawer").close(); } }, String(code));
	function outcomeCell(e) {
		return [badge(outcomeLevel(e.outcome), named(e.outcome || "")), e.errcode ? [" ", codeLink(e.errcode)] : "", !e.errcode && e.status && e.outcome !== "ok" ? [" ", el("span", { class: "soft keep" }, t("status", { n: e.status }))] : ""];
	}
	function entryMore(e) {
		const words = pick(e.meaning) || because(e.reason), remedy = pick(e.remedy);
		return [
			words ? el("p", { class: "more" }, words) : null, remedy ? el("p", { class: "more" }, el("strong", {}, t("remedy") + (lang === "zh" ? "：" : ": ")), remedy) : null,
			e.rid ? el("p", { class: "more code" }, t("rid", { rid: e.rid })) : null,
		];
	}
	function entryAccount(e) {
		if (!e.appid) return "";
		// Accounts of the configuration have no page of their own.
		if (!e.platform || e.appid === e.platform) return el("span", { class: "code" }, e.appid);
		return el("button", { type: "button", class: "link code", "data-key": `${e.seq} ${e.appid}`, on: () => openDrawer(e.appid, e.platform) }, e.appid);
	}
	function entryRow(e) {
		return el("tr", { role: "row" },
			cell(t("time"), timeOf(e.time, clock(e.time))), cell(t("kind"), named(e.kind || "")),
			cell(t("account"), e.appid || e.client ? el("div", {}, entryAccount(e), e.client ? el("p", { class: "more" }, t("client", { name: e.client })) : "") : ""),
			cell(t("what"), el("div", {}, el("span", { class: "code" }, e.what || ""), entryMore(e))), cell(t("outcome"), el("div", {}, outcomeCell(e))), cell(t("took"), took(e.took_ms)));
	}
	function entryRows(e) {
		return [rows([[t("time"), timeOf(e.time, `${clock(e.time)} (${ago(e.time)})`)], [t("what"), e.what ? el("span", { class: "code" }, e.what) : null], [t("outcome"), outcomeCell(e)], [t("took"), took(e.took_ms)]]), entryMore(e)];
	}

	// The live feed.
	const feed = { after: 0, entries: [], missed: 0, paused: false, error: null, appid: "", loaded: false };
	const feedLoop = repeat(FEED_EVERY, async () => {
		const appid = feed.appid, fresh = [];
		for (let round = 0; round < FEED_ROUNDS; round++) {
			const got = await ask("feed" + query({ after: feed.after, appid, limit: FEED_LIMIT }));
			if (feed.appid !== appid) return;
			if ((got.next || 0) < feed.after) { clearFeed(); fresh.length = 0; continue; } // the gateway began anew
			if (feed.loaded) feed.missed += got.missed || 0;
			fresh.push(...got.entries || []);
			feed.after = got.next || feed.after;
			if ((got.entries || []).length < FEED_LIMIT) break;
		}
		const first = !feed.loaded;
		feed.loaded = true;
		feed.error = null;
		feed.entries = feed.entries.concat(fresh).slice(-FEED_ROWS);
		if (first || fresh.length || feed.missed) showFeed(first ? 0 : fresh.length);
	}, () => view === "feed" && !feed.paused);
	feedLoop.failed = err => { feed.error = err; showFeed(0); };
	function clearFeed() { Object.assign(feed, { after: 0, entries: [], missed: 0, loaded: false }); }

	function wanted(e) {
		const kind = $("feed-kind").value, outcome = $("feed-outcome").value;
		return (!kind || e.kind === kind) && (!outcome || e.outcome !== "ok");
	}
	function showFeed(fresh) {
		const begin = feed.entries.length - fresh;
		const list = feed.entries.map((e, i) => [e, i >= begin]).filter(([e]) => wanted(e)).reverse();
		swap($("entries").tBodies[0], list.map(([e, isNew]) => { const row = entryRow(e); if (isNew && fresh) row.className = "new"; return row; }));
		$("entries").hidden = list.length === 0;
		$("entries-empty").hidden = list.length > 0;
		$("entries-empty").textContent = feed.error ? why(feed.error) : !feed.loaded ? t("loading") : feed.entries.length ? t("quietFilter") : t("quiet");
		const typing = $("feed-appid").value.trim(), unfinished = typing !== "" && !APPID.test(typing);
		$("missed").hidden = !feed.missed && !unfinished;
		$("missed").textContent = unfinished ? t("wrongAppid") : t("missed", { n: count(feed.missed) });
	}
	function showFeedTools() {
		const kind = $("feed-kind").value, outcome = $("feed-outcome").value;
		swap($("feed-kind"), el("option", { value: "" }, t("all")), ["push", "event", "call", "login", "authorization"].map(k => el("option", { value: k }, t(k))));
		swap($("feed-outcome"), el("option", { value: "" }, t("all")), el("option", { value: "problems" }, t("problems")));
		$("feed-kind").value = kind;
		$("feed-outcome").value = outcome;
		$("pause").textContent = t("pause");
	}
	$("feed-kind").addEventListener("change", () => showFeed(0));
	$("feed-outcome").addEventListener("change", () => showFeed(0));
	$("feed-appid").addEventListener("input", typed(() => {
		const appid = $("feed-appid").value.trim(), complete = APPID.test(appid) ? appid : "";
		if (complete !== feed.appid) { feed.appid = complete; clearFeed(); feedLoop.now(); }
		showFeed(0);
	}));
	$("pause").addEventListener("click", () => {
		feed.paused = !feed.paused;
		$("pause").setAttribute("aria-pressed", String(feed.paused));
		announce(t(feed.paused ? "paused" : "resumed"));
		feedLoop.now();
	});

	// Links.
	const links = { funcs: null, pages: [], error: null, open: new Set() };
	async function loadLinks() {
		try { const got = await ask("funcs"); Object.assign(links, { funcs: got.funcs || [], pages: got.authorize || [], error: null }); } catch (err) { links.error = err; }
		showLinks();
	}
	function linkRow(link) {
		const appid = $("fill-appid").value.trim(), whole = link.replaceAll(HOLE, APPID.test(appid) ? appid : HOLE);
		if (whole.includes(HOLE)) return el("div", { class: "linkrow" }, el("span", { class: "code" }, whole), el("p", { class: "soft" }, t("needAppid")));
		const code = links.open.has(whole);
		return el("div", { class: "linkrow" }, el("a", { class: "code", href: safe(whole), target: "_blank", rel: "noopener noreferrer", "data-key": "to " + whole }, whole),
			el("div", { class: "acts" },
				el("button", { type: "button", class: "small", "data-key": "copy " + whole, "aria-label": t("copyLink", { link: whole }), on: async () => {
					try { await navigator.clipboard.writeText(whole); announce(t("copied")); } catch { announce(t("notCopied")); }
				} }, t("copy")),
				el("button", { type: "button", class: "small", "data-key": "qr " + whole, "aria-expanded": String(code), "aria-label": t("qrFor", { link: whole }), on: () => {
					if (!links.open.delete(whole)) links.open.add(whole);
					showLinks();
				} }, t(code ? "hideQr" : "qr"))),
			code ? el("img", { class: "qr", src: "api/qr" + query({ text: whole }), alt: t("qrFor", { link: whole }), width: 208, height: 208 }) : null,
			code ? el("p", { class: "soft" }, t("scan")) : null);
	}
	const safe = link => /^https?:\/\//.test(link) ? link : undefined;
	function showLinks() {
		swap($("start"), links.pages.length && safe(links.pages[0]) ? el("a", { class: "button", href: links.pages[0], target: "_blank", rel: "noopener noreferrer", "data-key": "start" }, t("authorizeNow")) : null);
		const waiting = links.funcs === null ? el("p", { class: "soft" }, links.error ? why(links.error) : t("loading")) : null;
		swap($("starts"), waiting || (links.pages.length ? [el("p", {}, t("newHint")), links.pages.map(linkRow)] : el("p", { class: "soft" }, t("noAuthorize"))));
		const funcs = links.funcs || [];
		$("fill").hidden = !funcs.some(f => (f.links || []).some(l => l.includes(HOLE)));
		swap($("funcs"), links.funcs === null ? null : funcs.length ? funcs.map(f => el("section", { class: "card" }, el("div", { class: "head" }, el("h3", {}, el("bdi", {}, f.key)), el("span", { class: "badge" }, f.scope)),
			rows([[t("leadsTo"), el("span", { class: "code" }, f.to)], [t("onlyFor"), f.appids?.length ? el("span", { class: "code" }, f.appids.join(" ")) : null]]),
			f.links?.length ? f.links.map(linkRow) : el("p", { class: "soft" }, t("noLinks")))) : el("p", { class: "soft" }, t("noFuncs")));
	}
	$("fill-appid").addEventListener("input", showLinks);
	$("fill").addEventListener("submit", e => e.preventDefault());

	// Errors.
	let explained = null, asked = "";
	async function explain(code) {
		asked = code;
		if (!/^-?\d{1,9}$/.test(code)) { explained = { bad: true }; showExplained(); return; }
		try { const got = await ask("explain" + query({ code })); if (asked === code) explained = got; } catch (err) { if (asked === code) explained = { error: err }; }
		showExplained();
	}
	function showExplained() {
		$("explained").hidden = explained === null;
		if (explained === null) return;
		if (explained.bad || explained.error) { swap($("explained"), el("p", {}, explained.bad ? t("notCode") : why(explained.error))); return; }
		swap($("explained"), el("h2", {}, String(explained.errcode ?? asked)), explained.known === false ? el("p", {}, t("unknownCode")) : null,
			rows([[t("meaning"), pick(explained.meaning)], [t("remedy"), pick(explained.remedy)]]));
	}
	$("explain").addEventListener("submit", e => {
		e.preventDefault();
		const code = $("code").value.trim();
		if (location.hash === "#errors/" + code) explain(code);
		else if (/^-?\d{1,9}$/.test(code)) location.hash = "#errors/" + code;
		else explain(code);
	});

	const refused = { list: null, error: null };
	const refusalLoop = repeat(REFUSALS_EVERY, async () => {
		const text = $("refusal").value.trim();
		const by = APPID.test(text) ? { appid: text } : /^-?\d{1,9}$/.test(text) ? { code: text } : { rid: text };
		const got = await ask("refusals" + query({ ...by, limit: REFUSALS }));
		refused.list = got.refusals || [];
		refused.error = null;
		showRefused();
	}, () => view === "errors");
	refusalLoop.failed = err => { refused.error = err; showRefused(); };
	function showRefused() {
		const list = refused.list || [];
		swap($("refused").tBodies[0], list.map(entryRow));
		$("refused").hidden = list.length === 0;
		$("refused-empty").hidden = list.length > 0;
		$("refused-empty").textContent = refused.error ? why(refused.error) : refused.list === null ? t("loading") : t("noRefusals");
	}
	$("refusal").addEventListener("input", typed(() => refusalLoop.now()));
	$("refusal-search").addEventListener("submit", e => { e.preventDefault(); refusalLoop.now(); });

	// Sections.
	let view = "";
	function go() {
		const [name, rest] = location.hash.slice(1).split("/");
		const to = VIEWS.includes(name) ? name : "health";
		if (to !== view) {
			view = to;
			for (const v of VIEWS) $("view-" + v).hidden = v !== view;
			for (const a of document.querySelectorAll("nav a")) {
				if (a.hash === "#" + view) a.setAttribute("aria-current", "page"); else a.removeAttribute("aria-current");
			}
			scrollTo({ top: 0, behavior: "instant" });
			showTitle();
		}
		if (view === "authorizers") { showPlatforms(); showAccounts(); loadAccounts(true); accountsLoop.later(); if (links.funcs === null) loadLinks(); }
		if (view === "links") loadLinks();
		if (view === "errors" && rest) { $("code").value = rest; explain(rest); }
		if (view === "authorizers" && APPID.test(rest || "")) openDrawer(rest);
		feedLoop.now();
		refusalLoop.now();
	}
	function showTitle() {
		const bad = (status?.findings || []).filter(f => f.level === "red").length;
		document.title = `${bad ? `(${bad}) ` : ""}${t(view || "health")} · ${t("brand")}`;
	}
	addEventListener("hashchange", go);

	// The frame.
	function showFrame() {
		document.documentElement.lang = lang === "zh" ? "zh-CN" : "en";
		if (theme === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = theme;
		for (const e of document.querySelectorAll("[data-t]")) e.textContent = t(e.dataset.t);
		for (const e of document.querySelectorAll("[data-place]")) e.placeholder = t(e.dataset.place);
		for (const e of document.querySelectorAll("[data-label]")) e.setAttribute("aria-label", t(e.dataset.label));
		$("theme").textContent = t("theme_" + theme);
		$("language").textContent = t("otherLanguage");
		$("language").lang = lang === "zh" ? "en" : "zh-CN";
	}
	function showAll() {
		showFrame();
		showFeedTools();
		showStatus();
		showPlatforms();
		showAccounts();
		showDetail();
		showFeed(0);
		showLinks();
		showExplained();
		showRefused();
		showFresh();
		showTitle();
	}
	$("language").addEventListener("click", () => { lang = lang === "zh" ? "en" : "zh"; remember("wechat-console-language", lang); outcomes.clear(); setDetailStatus(""); showAll(); });
	$("theme").addEventListener("click", () => {
		theme = { auto: "light", light: "dark", dark: "auto" }[theme];
		remember("wechat-console-theme", theme);
		showFrame();
	});
	$("again").addEventListener("click", () => statusLoop.now());
	document.querySelector(".skip").addEventListener("click", e => { e.preventDefault(); $("main").focus(); });
	addEventListener("keydown", e => {
		if (e.key !== "/" || e.ctrlKey || e.metaKey || e.altKey || $("drawer").open || /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName)) return;
		e.preventDefault();
		const field = { feed: "feed-appid", links: $("fill").hidden ? "" : "fill-appid", errors: "code" }[view];
		if (!field) location.hash = "#authorizers";
		setTimeout(() => { $(field || "q").focus(); $(field || "q").select(); });
	});
	document.addEventListener("visibilitychange", () => {
		if (document.hidden) return;
		statusLoop.now();
		feedLoop.now();
		refusalLoop.now();
		accountsLoop.now();
	});
	setInterval(() => { if (!document.hidden) showFresh(); }, 1000);

	showAll();
	go();
	statusLoop.now();
})();
