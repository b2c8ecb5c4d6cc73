"""The style of a report: one column, light and dark, from a telephone to a wide screen."""

from __future__ import annotations

_LIGHT = ("#0f857b", "#d97a1e", "#5a5bd0", "#c23d38", "#77808d", "#55962f", "#bd4f96", "#2f86c6")
_DARK = ("#3fc1b4", "#f0a04b", "#9a9bff", "#ee7b75", "#9aa4b2", "#8fca68", "#e58bc3", "#6db8ee")


def style() -> str:
    """The style sheet."""
    light = "".join(f"--c{i}:{c};" for i, c in enumerate(_LIGHT))
    dark = "".join(f"--c{i}:{c};" for i, c in enumerate(_DARK))
    colours = "".join(
        f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}.k{i}{{--k:var(--c{i})}}" for i in range(len(_LIGHT))
    )
    return (
        f":root{{color-scheme:light dark;{light}--ink:#1d2330;--soft:#5d6675;--line:#dfe3ea;--card:#fff;--page:#f5f6f8;"
        "--warn:#fff4df;--warnline:#e3b457;--real:#0b6bb3;--synth:#8a4fb5}"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}--ink:#e7eaf0;--soft:#9da7b6;--line:#303846;--card:#1a2029;"
        "--page:#11151b;--warn:#33291a;--warnline:#8a6a2c;--real:#74bdf5;--synth:#cf9df2}}"
        f"{_RULES}{colours}"
    )


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,footer{max-width:1120px;margin:0 auto;padding:0 16px}
header{padding-top:26px}
h1{font-size:25px;line-height:1.2;margin:0 0 4px}
h2{font-size:21px;line-height:1.25;margin:0;overflow-wrap:anywhere}
h3{font-size:16px;margin:28px 0 10px}
h4{font-size:14px;margin:0}
p{margin:0}
a{color:var(--c7)}
.soft,footer,figcaption p,dt{color:var(--soft)}
.soft{font-size:13px;overflow-wrap:anywhere}
footer{padding:24px 16px 40px;font-size:13px}
section.item{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px;margin:20px 0}
.kind{display:inline-block;text-transform:uppercase;letter-spacing:.07em;font-size:11px;font-weight:700;color:var(--c0)}
.verdict{font-size:16.5px;line-height:1.45;margin:10px 0 14px;max-width:80ch;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:10px;margin:14px 0}
.tile{border:1px solid var(--line);border-radius:9px;padding:9px 12px}
.tile b{display:block;white-space:nowrap;font-size:19px;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{font-size:12.5px;color:var(--soft)}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px 7px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--soft);font-size:12.5px;font-weight:600}
tbody th{font-weight:500}
tbody tr:last-child>*{border-bottom:0}
td{white-space:nowrap}td.wrap{white-space:normal}.lead{font-weight:700}
th .badge{margin-left:8px}
.notes{margin:8px 0;padding-left:18px}
.badge{display:inline-block;white-space:nowrap;font-size:11.5px;line-height:1;padding:3px 7px;border-radius:99px;
border:1px solid;color:var(--soft)}
.badge.real{color:var(--real)}.badge.synthetic{color:var(--synth)}
.badges{display:flex;flex-wrap:wrap;gap:6px;margin:10px 0}
ul.warnings{list-style:none;margin:12px 0;padding:10px 14px;background:var(--warn);
border-left:4px solid var(--warnline);border-radius:6px;font-size:14px}
ul.warnings li+li{margin-top:5px}
ul.warnings li{overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,390px),1fr));column-gap:26px;align-items:start}
figure{margin:0;min-width:0}
.charts figure{display:grid;grid-template-rows:auto auto auto;grid-template-rows:subgrid;grid-row:span 3;gap:0}
figcaption{margin-bottom:6px}
figcaption p{font-size:12.5px;line-height:1.4}
svg{display:block;width:100%;height:auto;font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg text{fill:var(--soft)}
.grid{stroke:var(--line);stroke-width:1}.grid.zero{stroke:var(--soft);stroke-opacity:.6}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.dashed{stroke-dasharray:5 4}
.level{stroke-width:1.5;stroke-dasharray:2 4}
.band{fill-opacity:.16}
.dot{fill-opacity:0}.dot:hover,.dot.lone{fill-opacity:1}
.rail{fill:var(--line);fill-opacity:.45}
.more{fill:var(--c0);--k:var(--c0)}.less{fill:var(--c1);--k:var(--c1)}.even{--k:var(--line)}
.legend{display:flex;align-content:flex-start;margin-bottom:24px;flex-wrap:wrap;gap:2px 14px;
font-size:12.5px;color:var(--soft);margin-top:4px}
.legend span{display:inline-flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.key{flex:none;width:14px;height:3px;border-radius:2px;background:var(--k)}
.key.more,.key.less,.key.even,.key.area{height:11px;border-radius:3px}
.key.area{opacity:.25}.key.area.deep{opacity:.5}
.key.mark{width:3px;height:13px}
.key.dashed{background:repeating-linear-gradient(90deg,var(--k) 0 5px,transparent 5px 9px)}
.key.level{background:repeating-linear-gradient(90deg,var(--k) 0 2px,transparent 2px 5px)}
.picture img{display:block;width:100%;min-width:560px;height:auto;border-radius:8px;border:1px solid var(--line)}
.picture figcaption{margin:8px 0 0}
dl{margin:0}
dl.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:2px 26px;font-size:13.5px}
dl.facts>div{display:flex;justify-content:space-between;gap:14px;border-bottom:1px solid var(--line);padding:4px 0}
dt{flex:none;max-width:60%;overflow-wrap:anywhere}
dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0}
dl.recipe{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12.5px}
details{border-top:1px solid var(--line);margin-top:16px;padding-top:12px}
details+details{margin-top:12px}
summary{cursor:pointer;font-weight:600;font-size:15px;margin-bottom:6px}
@media(max-width:520px){th .badge{display:block;width:fit-content;margin:4px 0 1px}.tile b{font-size:17px}
section.item{padding:14px;border-radius:0;margin:14px -16px;
border-left:0;border-right:0}
h1{font-size:22px}.verdict{font-size:15.5px}th,td{padding-right:9px}table{font-size:13px}}
@media print{body{background:none}section.item{break-inside:auto;border:0}}
"""
