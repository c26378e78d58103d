"""Draws time of one layer against density out of a saved output of bench_attn_sm90 and peers.py.
usage: plot_density.py OUTPUT.txt PICTURE.svg [CONTEXT]"""
import re
import sys

LEFT, TOP, WIDTH, HEIGHT = 70, 60, 560, 320
FONT = 'font-family="sans-serif" font-size="13" fill="#222"'


def read(path, context):
    """(title, [(density, ms)] of the ABS gate, {name: ms} of what has no density)."""
    text = open(path, encoding="utf-8").read()
    section = re.search(rf"^gate d\d+ {context}: .*?(?=^\S)", text + "\nend", re.M | re.S).group(0)
    gate = [(float(d), float(t)) for d, t in re.findall(r"ABS uniform .* density ([\d.]+) +([\d.]+) ms", section)]
    full = re.search(r"ABS T=-inf +([\d.]+) ms", section)
    if full:
        gate.append((1.0, float(full.group(1))))
    lines = {"no gate": float(re.search(rf"gate d\d+ {context}: dense ([\d.]+) ms", section).group(1))}
    for name, ms in re.findall(rf"peer (\w+) +d\d+ +{context} +([\d.]+) ms", text):
        lines[{"cudnn": "cuDNN", "fa2": "FlashAttention-2"}.get(name, name)] = float(ms)
    return text.splitlines()[0].lstrip("# "), sorted(gate), lines


def main():
    source, picture = sys.argv[1:3]
    context = sys.argv[3] if len(sys.argv) > 3 else "131072"
    title, gate, lines = read(source, context)
    top = 1.08 * max([t for _, t in gate] + list(lines.values()))

    def x(density):
        return LEFT + WIDTH * density

    def y(ms):
        return TOP + HEIGHT * (1 - ms / top)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 150}" height="{TOP + HEIGHT + 60}">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{LEFT}" y="22" {FONT}>One layer of causal prefill, {context} tokens, 32 query and 8 KV heads, bf16</text>',
           f'<text x="{LEFT}" y="40" {FONT} opacity="0.7">{title}</text>']
    for i in range(6):
        out.append(f'<text x="{x(i / 5) - 10:.0f}" y="{TOP + HEIGHT + 20}" {FONT}>{i / 5:.1f}</text>')
        out.append(f'<path d="M{x(i / 5):.1f} {TOP}V{TOP + HEIGHT}" stroke="#eee"/>')
    for ms in range(0, int(top) + 1, 100):
        out.append(f'<text x="{LEFT - 36}" y="{y(ms) + 4:.0f}" {FONT}>{ms}</text>')
        out.append(f'<path d="M{LEFT} {y(ms):.1f}H{LEFT + WIDTH}" stroke="#eee"/>')
    out.append(f'<text x="{LEFT + WIDTH / 2 - 130:.0f}" y="{TOP + HEIGHT + 44}" {FONT}>'
               'density: kept pages of reachable ones</text>')
    out.append(f'<text x="16" y="{TOP - 8}" {FONT}>ms</text>')
    for name, ms in lines.items():
        out.append(f'<path d="M{LEFT} {y(ms):.1f}H{LEFT + WIDTH}" stroke="#888" stroke-dasharray="6 4"/>')
        out.append(f'<text x="{LEFT + WIDTH + 8}" y="{y(ms) + 4:.0f}" {FONT}>{name} {ms:.0f}</text>')
    points = " ".join(f"{x(d):.1f},{y(t):.1f}" for d, t in gate)
    out.append(f'<polyline points="{points}" fill="none" stroke="#0a6" stroke-width="2"/>')
    for density, ms in gate:
        out.append(f'<circle cx="{x(density):.1f}" cy="{y(ms):.1f}" r="4" fill="#0a6"/>')
        out.append(f'<text x="{x(density) + (7 if density < 0.9 else -34):.0f}" y="{y(ms) + 18:.0f}" {FONT}>{ms:.0f}</text>')
    out.append("</svg>")
    with open(picture, "w", encoding="utf-8") as f:
        f.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
