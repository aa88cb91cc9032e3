"""How the demo's page looks: on a desk and in a hand, without anything from elsewhere."""

STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; max-width: 62rem; color: #24292f; background: #fcfbf9; padding: 0 1.1rem }
h1 { font-size: 2.1rem; font-weight: 600; letter-spacing: -.02em; margin: 2.5rem 0 .5rem }
h2 { font-size: 1.3rem; font-weight: 600; margin: 0 0 .6rem } h3 { font-size: 1rem; font-weight: 600; margin: 1.2rem 0 .3rem }
p, ol { max-width: 44rem; margin: .4rem 0 .9rem } li { margin: .3rem 0 } .lead { font-size: 1.1rem; color: #444c56 }
section { border-top: 1px solid #e5e1d8; margin-top: 2.4rem; padding-top: 1.4rem }
img { max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 3px } figcaption, small, .aside { color: #6a7079 }
figcaption { font-size: .82rem } .aside { font-size: .85rem } code, pre { font: .85rem/1.5 ui-monospace, monospace }
pre { background: #f4f2ec; padding: .7rem .9rem; border-radius: 5px; overflow-x: auto; margin: .2rem 0 } code { overflow-wrap: anywhere }
.sheet { display: block; margin: 1.4rem 0 } .sheet img { width: 100%; border: 1px solid #e5e1d8 }
.tiles, .beside, .cards, .films { display: flex; flex-wrap: wrap; gap: 1rem } .tiles { gap: 1.2rem 2rem; margin: 1.6rem 0 }
.tiles div { flex: 1 1 11rem; border-left: 3px solid #3f7f97; padding-left: .8rem; font-size: .9rem; color: #444c56 }
.tiles b { display: block; font-size: 1.8rem; font-weight: 600; line-height: 1.25; color: #24292f }
.beside { gap: 1rem 2.5rem } .beside > div { flex: 1 1 24rem; min-width: 0 }
.scroll { overflow-x: auto } table { border-collapse: separate; border-spacing: 2px; font-size: .9rem; margin: .3rem 0 }
th, td { padding: .25rem .6rem; text-align: right; font-weight: 400 } th:first-child { text-align: left; white-space: nowrap }
tr:first-child th:not(:first-child) { color: #6a7079; text-align: center } td { font-variant-numeric: tabular-nums }
.share { border-radius: 3px; text-align: center } .share small { display: block; font-size: .72rem; white-space: nowrap }
td.good { color: #1f6a45 } td.bad { color: #a3381f; font-weight: 600 }
.bar { display: grid; grid-template-columns: 1fr auto; gap: 0 1rem; font-size: .9rem; margin: .6rem 0; max-width: 44rem }
.bar > div { grid-column: 1 / 3; position: relative; height: .6rem; background: #efece4; border-radius: 3px }
.bar i { display: block; height: 100%; background: #8fbccd; border-radius: 3px }
.bar b { position: absolute; top: 35%; height: 30%; min-width: 2px; background: #24586c }
.films figure { flex: 1 1 17rem; max-width: 28rem; margin: 0 } .films img { width: 100% }
article { box-sizing: border-box; flex: 1 1 15rem; max-width: 28rem; padding: .7rem .8rem; background: #fff; font-size: .92rem }
article { border: 1px solid #e5e1d8; border-top-width: 3px; border-radius: 5px }
article.good { border-top-color: #5f9c7e } article.bad { border-top-color: #c4573b } article.bad .said { color: #a3381f }
article p { margin: .25rem 0; overflow-wrap: anywhere; white-space: pre-line } .asked { font-weight: 500 }
.views { display: flex; gap: 4px } .views img { flex: 1; min-width: 0; max-width: 9rem }
svg { background: #f4f2ec } polyline.learned { stroke: #3f7f97; stroke-width: 1.6 } circle.held { fill: #c4573b }
figure { margin-right: 1.5rem; max-width: 100% }
i.learned, i.held { display: inline-block; width: 1.4em; height: .22em; vertical-align: middle; background: #3f7f97 }
i.held { width: .55em; height: .55em; border-radius: 50%; background: #c4573b }
@media (max-width: 30rem) { h1 { font-size: 1.7rem } figure { margin-right: 0 } th, td { padding: .2rem .35rem } }
"""
