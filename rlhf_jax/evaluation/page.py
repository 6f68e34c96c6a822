"""Frame and style of `report.html`: no script, nothing loaded from elsewhere, light and dark, phone and desk."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>rlhf_jax: report of a run</title><style>{style}</style></head><body><main>
<header class="top"><p class="kicker">rlhf_jax · the InstructGPT recipe</p>
<h1>From a model that continues text to one that follows instructions</h1>
<p class="lead">{summary}</p>
<p>A language model learns from demonstrations (SFT). Labelers rank several of its answers, and a reward model learns
their taste. Then reinforcement learning (PPO) moves the model towards answers that the reward model likes, on a leash
that keeps it near where it started. This page shows what each step changed.</p>{models}</header>
<nav>{nav}</nav>{body}
<footer>Method: Ouyang et al. 2022, “Training language models to follow instructions with human feedback”.</footer>
</main></body></html>
"""

STYLE = """
:root{--bg:#fcfcfa;--card:#fff;--text:#22252a;--soft:#6a7078;--faint:#e4e5e2;--good:#00795a;--bad:#b3400a;
  --base:#8b929c;--prompted-base:#4ba6dd;--sft:#d99a00;--best-of-4:#bf6d9e;--ppo:#d0550b;--ppo-ptx:#0069b0;
  --reward-model:#00966c}
@media(prefers-color-scheme:dark){
  :root{--bg:#15171a;--card:#1c1f23;--text:#e4e5e3;--soft:#9aa1a9;--faint:#2e3237;--good:#3fbf96;--bad:#f08a55;
    --base:#8d949d;--prompted-base:#82ccf5;--sft:#e6b033;--best-of-4:#d98fbb;--ppo:#ee7b34;--ppo-ptx:#4098e0;
    --reward-model:#2fb98d}
}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--text);font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,
  "Helvetica Neue",sans-serif}
main{max-width:1120px;margin:0 auto;padding:48px 20px 64px}
p{max-width:68ch;margin:0 0 1em}
.kicker{color:var(--soft);margin:0 0 6px;font-size:14px}
h1{font-size:clamp(26px,4.4vw,38px);line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 20px;
  max-width:24em;text-wrap:balance}
.lead{font-size:clamp(18px,2.2vw,21px);line-height:1.5}
h2{font-size:22px;line-height:1.3;font-weight:620;letter-spacing:-.01em;margin:0 0 10px}
section{border-top:1px solid var(--faint);padding-top:30px;margin-top:44px;scroll-margin-top:8px}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:26px;font-size:14px}
a{color:var(--ppo-ptx);text-decoration:none}
a:hover{text-decoration:underline}
.models{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:22px 0 0;font-size:14.5px}
dt{font-weight:600}
dt::before{content:"";display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--c);
  margin-right:9px}
dd{margin:0;color:var(--soft)}
.verdicts{list-style:none;padding:0;margin:18px 0 0;display:grid;gap:12px}
.verdicts li{display:flex;gap:12px;max-width:72ch}
.verdicts b{flex:none;width:24px;height:24px;border-radius:50%;display:grid;place-items:center;font-size:13px;
  line-height:1;color:var(--bg);background:var(--soft)}
.verdicts .yes b{background:var(--good)}
.verdicts .no b{background:var(--bad)}
.verdicts span{display:block}
.verdicts small{color:var(--soft);font-size:14px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:28px 36px;margin-top:22px}
figure{margin:0;max-width:440px}
figcaption{font-weight:600;font-size:14.5px;margin-bottom:8px}
svg{display:block;width:100%;height:auto;overflow:visible;font-size:12px}
svg text{fill:var(--text)}
svg .tick{fill:var(--soft);font-size:11px}
svg .value{font-variant-numeric:tabular-nums;font-weight:600}
svg .grid{stroke:var(--faint)}
svg .axis{stroke:var(--soft);opacity:.5}
svg .reference{stroke:var(--soft);stroke-dasharray:4 3;fill:none}
svg .whisker{stroke:var(--text);stroke-width:1.4;fill:none}
svg .halo{stroke:var(--bg);stroke-width:4;fill:none;opacity:.8}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px}
.legend i{display:inline-block;width:14px;height:4px;border-radius:2px;margin-right:7px;vertical-align:middle}
article{margin:26px 0 34px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,
  "DejaVu Sans Mono",monospace}
.prompt{border-left:3px solid var(--text);padding:2px 0 2px 14px;margin-bottom:14px;font-size:14px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,190px),1fr));gap:12px}
.card{background:var(--card);border:1px solid var(--faint);border-top:3px solid var(--c);border-radius:4px;
  padding:10px 12px 12px}
.card header{display:flex;justify-content:space-between;font-size:13.5px;margin-bottom:6px;color:var(--soft);
  font-variant-numeric:tabular-nums}
.card header b{color:var(--text)}
.empty,.missing{color:var(--soft);font-style:italic}
table{border-collapse:collapse;font-size:14.5px;margin-top:14px}
th,td{text-align:left;vertical-align:top;padding:7px 18px 7px 0;border-bottom:1px solid var(--faint)}
th{font-weight:600}
.keys{font-size:13px}
.keys th{font-weight:400;color:var(--soft)}
.keys td{overflow-wrap:anywhere}
details{margin:10px 0}
summary{cursor:pointer;color:var(--ppo-ptx)}
footer{margin-top:56px;color:var(--soft);font-size:13.5px}
@media(max-width:640px){
  main{padding-top:28px}
  .stack thead{display:none}
  .stack tr{display:block;border-bottom:1px solid var(--faint);padding:10px 0}
  .stack td{display:grid;grid-template-columns:5.5em 1fr;gap:8px;border:0;padding:2px 0}
  .stack td::before{content:attr(data-label);color:var(--soft)}
  .stack td:first-child{font-weight:600;display:block}
  .stack td:first-child::before{content:none}
  .models{grid-template-columns:1fr}
  .models dd{margin:-2px 0 6px 19px}
}
@media print{
  nav{display:none}
}
"""
