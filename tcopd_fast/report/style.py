"""The style sheet of the report page, and the colours of the stages."""

from __future__ import annotations

from tcopd_fast.clock import STAGES

_STAGE_COLOURS = ("#94a3b8", "#2563eb", "#0f9d76", "#84cc16", "#eab308", "#f97316", "#be123c", "#7c3aed", "#e5e7eb")
STAGE_COLOURS = dict(zip((*STAGES, "other"), _STAGE_COLOURS, strict=True))

PAGE_STYLE = """
:root{--ink:#111827;--soft:#4b5563;--line:#e5e7eb;--panel:#fff;--ground:#f7f8fa;--mark:#fff8e1}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",Arial,sans-serif}
main{max-width:1280px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:26px;line-height:1.2;margin:8px 0 4px}
h2{font-size:19px;margin:40px 0 4px}
h3{font-size:15px;margin:22px 0 8px}
p{margin:4px 0 12px}
.lead,.caption,.missing{color:var(--soft)}
.caption{font-size:13.5px;max-width:92ch}
.runs{display:flex;flex-wrap:wrap;gap:4px 18px;padding:10px 0;margin:8px 0 0;list-style:none;background:var(--ground);
  border-bottom:1px solid var(--line)}
.runs li{display:flex;align-items:center;gap:7px;font-weight:600;overflow-wrap:anywhere}
.runs small,th small,td small{font-weight:400;color:var(--soft)}
.chip{flex:none;display:inline-block;width:22px;height:4px;border-radius:2px}
.panel{background:var(--panel);border:1px solid var(--line);border-radius:8px}
.scroll{overflow-x:auto}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
thead th{color:var(--soft);font-weight:600;border-bottom:2px solid var(--line);vertical-align:bottom}
tbody th{font-weight:600}
tr:last-child>*{border-bottom:0}
th.text,td.text{text-align:left}
td.text{white-space:normal;overflow-wrap:anywhere;min-width:130px;max-width:340px}
tr.differs>*{background:var(--mark)}
tr.group>th{text-align:left;color:var(--soft);background:var(--ground);font-weight:600}
tr.group span{position:sticky;left:12px}
td .chip,th .chip{vertical-align:middle;margin-right:8px}
.auto{display:inline-block;max-width:100%}
.auto table{width:auto}
.auto td,.auto th{min-width:120px}
th.text:first-child{position:sticky;left:0;background:var(--panel)}
tr.differs>th.text:first-child{background:var(--mark)}
.pair{display:flex;flex-wrap:wrap;gap:0 24px}
.pair section{max-width:100%}
.shared{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));gap:10px 20px;margin:0;
  padding:14px 16px;font-size:14px}
.shared dt{color:var(--soft);font-size:13px}
.shared dd{margin:0;overflow-wrap:anywhere}
.notes{margin:10px 0;padding-left:20px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:16px}
figure{margin:0;padding:12px 14px 8px}
figcaption{font-weight:600;margin-bottom:4px;overflow-wrap:anywhere}
figcaption small{display:block;min-height:1.5em;font-weight:400;color:var(--soft)}
figure img{display:block;width:100%;height:auto}
.bars{padding:14px 16px}
.bar{display:grid;grid-template-columns:minmax(90px,180px) 1fr 74px;gap:12px;align-items:center;margin:7px 0}
.bar>b{font-size:14px;overflow-wrap:anywhere;line-height:1.25}
.bar>span{text-align:right;font-size:14px;font-variant-numeric:tabular-nums}
.stack{display:flex;height:20px;border-radius:3px;overflow:hidden}
.stack i{display:block;min-width:1px}
.keys{display:flex;flex-wrap:wrap;gap:4px 16px;margin:12px 0 0;padding:0;list-style:none;font-size:13.5px}
.keys i{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:6px;vertical-align:-1px}
.gantt{padding:12px 16px;margin:0 0 14px}
.lane{display:grid;grid-template-columns:76px 1fr;gap:10px;align-items:center;margin:4px 0;font-size:13px}
.lane b{font-weight:600;white-space:nowrap}
.strip{position:relative;height:20px;background:var(--ground);overflow:hidden}
.strip>*{position:absolute;top:0;bottom:0}
.strip i{min-width:.5px}
.strip u{width:1px;background:var(--ink);opacity:.45}
.heads .strip,.ticks .strip{background:none;color:var(--soft)}
.heads span{padding-left:5px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis;
  border-left:1px solid var(--soft)}
.ticks span{white-space:nowrap;transform:translateX(-50%)}
.ticks span:first-child{transform:none}
.meter{height:4px;border-radius:2px;margin-top:3px;margin-left:auto}
.sample{padding:12px 16px;margin:0 0 14px;background:var(--panel);border:1px solid var(--line);border-radius:8px}
.sample header{display:flex;flex-wrap:wrap;gap:4px 10px;align-items:baseline;font-size:13.5px;color:var(--soft);
  overflow-wrap:anywhere}
.verdict{padding:0 8px;border-radius:9px;background:#e5e7eb;color:#374151;font-size:12.5px}
.right{background:#d1fae5;color:#065f46}
.wrong{background:#fee2e2;color:#991b1b}
.problem{white-space:pre-wrap;overflow-wrap:anywhere;margin:8px 0;font-weight:500;max-height:12em;overflow-y:auto}
details{margin:6px 0}
details.run{margin:14px 0}
summary{cursor:pointer;font-size:13.5px;color:var(--soft)}
details.run>summary{font-size:15px;font-weight:600;color:var(--ink);margin-bottom:8px}
.tokens{font:13.5px/2 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere;
  padding:2px 0}
.tokens span{padding:2px 1px;margin-right:1px;border-radius:2px;unicode-bidi:isolate;white-space:pre-wrap}
.none{outline:1px dotted #9ca3af}
.zero{background:#f3f4f6}
.gap{color:var(--soft);margin:0 8px}
.scale{display:flex;flex-wrap:wrap;gap:4px 10px;align-items:center;font-size:13.5px;color:var(--soft);margin:8px 0 12px}
.ramp{display:inline-flex;border:1px solid var(--line);border-radius:3px;overflow:hidden}
.ramp i{width:11px;height:14px}
footer{margin-top:40px;color:var(--soft);font-size:13px}
@media (min-width:900px){.runs{position:sticky;top:0;z-index:1}}
@media (max-width:520px){.shared{grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
  main{padding:14px 12px 40px}h1{font-size:22px}th,td{padding:6px 9px}
  .bar{grid-template-columns:1fr 70px;gap:2px 10px}.bar>b{grid-column:1/3}}
"""
