"""The look of every report: one style sheet and one short script, included in each page, so that a page is one file that needs no network.

Colours are those of Okabe and Ito (2008), which colour-blind readers can distinguish, darker on white and lighter on black."""

CSS = """
:root{color-scheme:light dark;--page:#f6f7f8;--card:#fff;--text:#16191d;--muted:#5d656d;--line:#dfe3e7;--grid:#e9ecef;--soft:#f1f4f6;
--accent:#0b62a8;--on-accent:#fff;--warn:#8a5300;--warn-bg:#fff6e3;--warn-line:#f0cf8a;--bad:#b3341a;--good:#13795b;
--c0:#0b62a8;--c1:#d55e00;--c2:#008f68;--c3:#a0458f;--c4:#b98700;--c5:#3a9fdc}
@media(prefers-color-scheme:dark){:root{--page:#0f1215;--card:#171b1f;--text:#e7eaed;--muted:#9aa4ad;--line:#2c333a;--grid:#252b31;
--soft:#1f252b;
--accent:#62b1ee;--on-accent:#08121a;--warn:#f3c469;--warn-bg:#2a2312;--warn-line:#5c4a1d;--bad:#ff8f73;--good:#4fd0a4;
--c0:#62b1ee;--c1:#f58a42;--c2:#3ccb9f;--c3:#dc92cd;--c4:#f0c04a;--c5:#9bd6f7}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1280px;margin:0 auto;padding:28px 24px 56px}
h1{font-size:15px;font-weight:600;margin:0;overflow-wrap:anywhere}
h2{font-size:16px;font-weight:650;margin:0 0 2px}
p{margin:0}
a{color:var(--accent);text-underline-offset:2px}
code,pre,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:13px}
.top{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline;color:var(--muted)}
.top h1{color:var(--text)}
.answer{font-size:27px;line-height:1.28;font-weight:620;letter-spacing:-.012em;margin:14px 0 18px;max-width:44em;text-wrap:pretty;
overflow-wrap:break-word}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:12px;margin:0 0 16px}
.fact{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:11px 14px;border-top:3px solid var(--line)}
.fact b{display:block;font-size:15px}.fact span{color:var(--muted);font-size:13.5px;line-height:1.4;display:block;margin-top:2px}
.fact.good{border-top-color:var(--good)}.fact.warn{border-top-color:var(--warn)}.fact.bad{border-top-color:var(--bad)}
.note{background:var(--warn-bg);border:1px solid var(--warn-line);border-radius:10px;padding:12px 16px;margin:0 0 16px}
.note b{color:var(--warn)}.note.error b{color:var(--bad)}.note ul{margin:4px 0 0;padding-left:20px}
.note.error{border-color:var(--bad)}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;margin:0 0 16px;min-width:0}
.card>p.sub{color:var(--muted);font-size:13.5px;margin:0 0 10px;max-width:110ch}
.pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:0 16px}
.trio{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:0 16px}
.scroll{overflow-x:auto;margin:0 -18px;padding:0 18px;scrollbar-width:thin}
table{border-collapse:collapse;width:100%}
th,td{padding:6px 10px;text-align:left;border-bottom:1px solid var(--grid);white-space:nowrap;vertical-align:baseline}
tbody tr:last-child td,tbody tr:last-child th{border-bottom:0}
th{font-weight:600}thead th{color:var(--muted);font-size:13px;border-bottom-color:var(--line);vertical-align:bottom}
td.n,th.n{text-align:right}td.wrap{white-space:normal;overflow-wrap:anywhere;min-width:18em}
th:first-child,td:first-child{padding-left:4px}
th button{all:unset;cursor:pointer;color:inherit;font:inherit}th button:focus-visible{outline:2px solid var(--accent);outline-offset:2px;
border-radius:2px}
th button:after{content:"";display:inline-block;width:1em;text-align:center;color:var(--accent)}
th.n button:after{margin-right:-.4em}
th[aria-sort=ascending] button:after{content:"\\2191"}th[aria-sort=descending] button:after{content:"\\2193"}
tr.best{background:var(--soft)}tr.best td{font-weight:650}
tr.lit td,tr.lit th{background:var(--soft)}
.dim{color:var(--muted)}.apart{margin-top:12px}
.state{display:inline-flex;align-items:center;gap:6px}.state:before{content:"";width:8px;height:8px;border-radius:50%;
background:var(--muted);flex:none}
.state.completed:before{background:var(--good)}.state.failed:before,.state.killed:before{background:var(--bad);border-radius:1px}
.state.running:before{background:none;border:2px solid var(--accent)}.state.waiting:before{background:none;border:1.5px solid var(--muted)}
.state.pruned:before,.state.interrupted:before{background:var(--warn);border-radius:1px;height:3px}
.bar{display:grid;grid-template-columns:minmax(40px,1fr) 4em;align-items:center;gap:6px;min-width:104px}
.bar i{display:block;height:12px;border-radius:2px;background:color-mix(in oklab,var(--accent) 45%,var(--card));min-width:1px}
.bar span{text-align:right}
tr.best .bar i{background:var(--accent)}
.more{font:inherit;font-size:13px;margin:8px 0 0;padding:3px 12px;border:1px solid var(--line);border-radius:6px;background:var(--card);
color:var(--text);cursor:pointer}
.bars td:first-child{white-space:normal;min-width:7.5em}
.bars td{border:0;padding-top:3px;padding-bottom:3px}
svg{display:block}
.strip{width:120px;height:20px;margin-bottom:-4px}.strip .grid{stroke:var(--grid)}.strip .band{fill:var(--accent);opacity:.22}
.strip .seed{fill:none;stroke:var(--accent);stroke-width:1.2}.strip .mean{stroke:var(--accent);stroke-width:2.4}
.chart{width:100%;height:auto;overflow:visible;touch-action:pan-y}
.chart text{font-size:12px;fill:var(--muted)}.chart .label{font-size:12px}.chart .name{fill:var(--text);font-weight:600}
.middle{text-anchor:middle}.end-anchor{text-anchor:end}
.chart .grid{stroke:var(--grid)}.chart .axis{stroke:var(--line)}.chart .upright{stroke:var(--line);stroke-width:1.5}
.halo{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.series{--s:var(--c0);stroke:var(--s)}.k0{--s:var(--c0)}.k1{--s:var(--c1)}.k2{--s:var(--c2)}.k3{--s:var(--c3)}.k4{--s:var(--c4)}
.k5{--s:var(--c5)}.km{--s:var(--muted)}
.line{fill:none;stroke-width:1.5;stroke-linejoin:round;stroke-linecap:round}
.series .dot{fill:var(--s);stroke:var(--card);stroke-width:1.4}.series .end{fill:none;stroke-width:2.2}.series .open{fill:var(--card)}
.series.faint .line{opacity:.32;stroke-width:1}.series.km .line{opacity:.55}.series.strong .line{stroke-width:2.6}
.series.pruned .line{stroke-dasharray:5 4}
.series.failed .line{stroke-dasharray:1.5 4}
.plot.some .series{opacity:.14}.plot.some .series.lit{opacity:1}.plot.some .series.lit .line{stroke-width:3;opacity:1}
.join{fill:none;stroke:var(--accent);stroke-width:1.5;opacity:.5}
.point .spread{stroke:var(--accent);stroke-width:1.5;fill:none}.point .seed{fill:none;stroke:var(--accent)}
.point .mean{fill:var(--card);stroke:var(--accent);stroke-width:2}.point.best .mean{fill:var(--accent)}.point.lit .mean{fill:var(--c1);
stroke:var(--c1)}
.point.stopped .mean{stroke:var(--muted);stroke-dasharray:2.5 2}.track.stopped .line{stroke-dasharray:5 4}
.track .line{stroke:color-mix(in oklab,var(--accent) var(--p),var(--line));stroke-width:1.6}.track.best .line{stroke:var(--c1);
stroke-width:3.2}
.track:hover .line,.track.lit .line{stroke:var(--c1);stroke-width:3.2}
.parallel{min-width:760px}
.legend{display:flex;flex-wrap:wrap;gap:3px 16px;font-size:13px;color:var(--muted);margin:6px 0 0}
.legend span{display:inline-flex;align-items:center;gap:6px}.legend i{width:18px;height:0;border-top:2.5px solid var(--s);
display:inline-block}
.legend .strong{border-top-width:4px}.legend .pruned{border-top-style:dashed}.legend .failed{border-top-style:dotted}
.legend b{font-weight:400;color:var(--text);width:14px;text-align:center}
.heat{border-collapse:separate;border-spacing:3px;margin:4px 0 0;table-layout:fixed;min-width:300px}
.heat th,.heat td{border:0;padding:4px;text-align:center}.heat thead th{color:var(--text)}.heat th.axis{color:var(--muted);font-weight:400;
font-size:13px}
.heat tbody th{text-align:right;vertical-align:middle;padding-right:8px;width:5.5em}.heat thead th:first-child{width:5.5em}
.heat td{height:62px;vertical-align:middle;border-radius:6px;background:color-mix(in oklab,var(--accent) var(--p),var(--soft));
font-size:16px;line-height:1.25}
.heat td.dark{color:var(--on-accent)}.heat td small{display:block;font-size:12px;opacity:.85}.heat td.none{background:none;
border:1px dashed var(--line);color:var(--muted);font-size:13px}
.heat td.best{outline:2.5px solid var(--text);outline-offset:1px;font-weight:700}
.command{display:flex;gap:10px;align-items:flex-start;background:var(--soft);border-radius:8px;padding:10px 12px;margin:6px 0 14px}
.command pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;flex:1;min-width:0}
.command button{flex:none;font:inherit;font-size:13px;padding:2px 10px;border:1px solid var(--line);border-radius:6px;
background:var(--card);color:var(--text);cursor:pointer}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:5px 18px;margin:6px 0 0}dt{color:var(--muted)}dd{margin:0;
overflow-wrap:anywhere}
summary{cursor:pointer;font-weight:650;font-size:16px}details[open]>summary{margin-bottom:8px}
pre.box{background:var(--soft);border-radius:8px;padding:10px 12px;margin:8px 0 0;overflow:auto;max-height:26em;white-space:pre-wrap;
overflow-wrap:anywhere}
.tip{position:fixed;z-index:9;pointer-events:none;background:var(--text);color:var(--card);border-radius:6px;padding:5px 9px;
font-size:13px;line-height:1.35;
max-width:min(360px,80vw);white-space:pre-line;overflow-wrap:anywhere;opacity:0}
.tip.on{opacity:1}
@media(min-width:561px) and (max-width:860px){.trio{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media(max-width:860px){.pair{grid-template-columns:minmax(0,1fr)}.answer{font-size:22px}}
.only-narrow{display:none}
.failure{padding:9px 0;border-top:1px solid var(--grid)}.failure:first-of-type{border-top:0;padding-top:4px}
.failure .top{font-size:14px}.failure p{overflow-wrap:anywhere;margin-top:2px}
dd summary{font-size:inherit;font-weight:inherit}
@media(max-width:560px){.bar{grid-template-columns:minmax(22px,1fr) 3.2em;min-width:78px}.only-wide{display:none}
.only-narrow{display:block}th,td{padding:5px 7px}table{font-size:14px}
.trio{grid-template-columns:minmax(0,1fr)}main{padding:18px 12px 40px}.answer{font-size:19px}.card{padding:13px 14px}
.scroll{margin:0 -14px;padding:0 14px}
.chart text,.chart .label{font-size:17px}.trio .chart text{font-size:12.5px}.heat td{font-size:14px;height:54px}
.heat td small{font-size:11px}
dl{grid-template-columns:minmax(0,1fr);gap:0}dd{margin:0 0 7px}.command{flex-direction:column}}
@media print{body{background:#fff}.card,.fact{break-inside:avoid}.command button{display:none}}
"""

SCRIPT = """
(() => {
  const tip = document.body.appendChild(Object.assign(document.createElement("div"), {className: "tip"}));
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  // a chart's <title> would show late and twice: it becomes the text of our own tip
  all("svg title").forEach(title => { title.parentNode.dataset.tip = title.textContent; title.remove(); });
  const show = (event, text) => {
    tip.textContent = text; tip.classList.add("on");
    const box = tip.getBoundingClientRect(), x = event.clientX + 14, y = event.clientY + 14;
    tip.style.left = Math.max(4, x + box.width > innerWidth - 4 ? event.clientX - box.width - 14 : x) + "px";
    tip.style.top = Math.max(4, y + box.height > innerHeight - 4 ? event.clientY - box.height - 14 : y) + "px";
  };
  let lit = null;
  const light = job => {
    if (job === lit) return;
    lit = job;
    all(".lit").forEach(one => one.classList.remove("lit"));
    all(".plot.some").forEach(one => one.classList.remove("some"));
    if (job === null) return;
    all("[data-job]").filter(one => one.dataset.job.split(" ").some(number => job.split(" ").includes(number))).forEach(one => {
      one.classList.add("lit");
      const plot = one.closest(".plot");
      if (plot && plot.children.length > 1) plot.classList.add("some");
    });
  };
  const clear = () => { tip.classList.remove("on"); light(null); };
  const digits = range => Math.min(6, Math.max(2, 2 - Math.floor(Math.log10(range || 1))));
  all("svg[data-range]").forEach(svg => {
    const [left, right, bottom, top, x0, x1, y0, y1] = svg.dataset.range.split(",").map(Number);
    const curves = all(".series", svg).map(series => ({
      series, points: (series.querySelector(".line").getAttribute("d").match(/[ML]-?[\\d.]+,-?[\\d.]+/g) || [])
        .map(point => [...point.slice(1).split(",").map(Number), point[0] === "M"]),
    }));
    svg.addEventListener("pointermove", event => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      let best = null, nearest = 45;
      for (const {series, points} of curves) for (let i = 0; i < points.length; i++) {
        const [ax, ay] = points[i], next = points[i + 1], [bx, by] = next && !next[2] ? next : points[i];  // not across a gap
        const part = bx > ax ? Math.min(1, Math.max(0, (at.x - ax) / (bx - ax))) : 0, x = ax + part * (bx - ax), y = ay + part * (by - ay);
        const distance = Math.hypot(at.x - x, at.y - y);
        if (distance < nearest) { nearest = distance; best = {series, x, y}; }
      }
      if (!best) return clear();
      const value = y0 + (bottom - best.y) / (bottom - top) * (y1 - y0), tokens = x0 + (best.x - left) / (right - left) * (x1 - x0);
      const number = Math.abs(value) < 0.001 && value ? value.toExponential(2) : value.toFixed(digits(y1 - y0));
      show(event, best.series.dataset.tip + "\\n" + number + " at " + Math.round(tokens).toLocaleString("en") + " tokens");
      light(best.series.dataset.job || null);
    });
    svg.addEventListener("pointerleave", clear);
  });
  all("[data-tip]:not(.series)").forEach(one => {
    one.addEventListener("pointermove", event => { show(event, one.dataset.tip); light(one.dataset.job || null); });
    one.addEventListener("pointerleave", clear);
  });
  all("tr[data-job]").forEach(row => {
    row.addEventListener("pointerenter", () => light(row.dataset.job));
    row.addEventListener("pointerleave", () => light(null));
  });
  all("table[data-most]").forEach(table => {  // long tables begin folded
    const rows = all("tr", table.tBodies[0]), most = +table.dataset.most;
    if (rows.length <= most + 3) return;
    const fold = () => all("tr", table.tBodies[0]).forEach((row, place) => { row.hidden = place >= most; });
    const button = Object.assign(document.createElement("button"), {className: "more", type: "button", textContent: "show all " + rows.length});
    button.addEventListener("click", () => { table.fold = null; rows.forEach(row => { row.hidden = false; }); button.remove(); });
    table.fold = fold; table.parentNode.after(button); fold();
  });
  all("th button").forEach(button => button.addEventListener("click", () => {
    const head = button.parentNode, table = head.closest("table"), column = [...head.parentNode.children].indexOf(head);
    const down = head.getAttribute("aria-sort") === "ascending";
    all("th", table.tHead).forEach(one => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.children[column].dataset.v ?? "", number = text => text !== "" && isFinite(text);
    all("tr", table.tBodies[0]).sort((a, b) => {
      const x = value(a), y = value(b);
      if ((x === "") !== (y === "")) return x === "" ? 1 : -1;  // what is missing comes last either way
      const order = number(x) && number(y) ? x - y : x.localeCompare(y, "en", {numeric: true});
      return down ? -order : order;
    }).forEach(row => table.tBodies[0].append(row));
    if (table.fold) table.fold();
  }));
  all(".command button").forEach(button => button.addEventListener("click", async () => {
    const text = button.parentNode.querySelector("pre");
    try { await navigator.clipboard.writeText(text.textContent); button.textContent = "copied"; }
    catch { getSelection().selectAllChildren(text); button.textContent = "selected"; }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  }));
})();
"""
