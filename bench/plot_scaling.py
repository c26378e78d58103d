"""Draws speed-up against ranks out of a CSV of bench_prefill.
usage: plot_scaling.py OUTPUT.csv PICTURE.svg"""
import csv
import sys

LEFT, TOP, WIDTH, HEIGHT = 60, 74, 420, 320
FONT = 'font-family="sans-serif" font-size="13" fill="#222"'
COLORS = ["#0a6", "#06c", "#c40", "#828", "#660"]  # of prompts
DASHES = ["", "7 4", "2 3", "9 3 2 3"]  # of modes


def read(path):
    """(comment lines, {(prompt, mode): [(tp, speed-up, share of communication)]}) in the file's order."""
    with open(path, encoding="utf-8") as f:
        lines = f.read().splitlines()
    notes = [line[2:] for line in lines if line.startswith("#")]
    cases = {}
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        if row["speedup"]:
            point = (int(row["tp"]), float(row["speedup"]), float(row["comm_share"]))
            cases.setdefault((int(row["prompt"]), row["mode"]), []).append(point)
    return notes, {case: sorted(points) for case, points in cases.items()}


def spread(wanted, gap):
    """The heights nearest to those wanted, from the top down, that are `gap` apart."""
    out = []
    for y in wanted:
        out.append(y if not out else max(y, out[-1] + gap))
    over = max(0, out[-1] - (TOP + HEIGHT)) if out else 0
    return [y - over for y in out]


def main():
    source, picture = sys.argv[1:3]
    notes, cases = read(source)
    if not cases:
        sys.exit(source + ": no speed-up (no run with one rank?)")
    most = max(tp for points in cases.values() for tp, _, _ in points)
    top = 1.05 * max(most, max(s for points in cases.values() for _, s, _ in points))

    def x(tp):
        return LEFT + WIDTH * (tp - 0.5) / most

    def y(speedup):
        return TOP + HEIGHT * (1 - speedup / top)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 430}" height="{TOP + HEIGHT + 60}">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{LEFT}" y="22" {FONT}>Prefill of a whole prompt: speed-up over one rank</text>']
    for i, note in enumerate(note.split(";")[0] for note in notes[:3]):
        out.append(f'<text x="{LEFT}" y="{36 + 13 * i}" {FONT.replace("13", "11")} opacity="0.7">{note}</text>')
    for tp in sorted({tp for points in cases.values() for tp, _, _ in points}):
        out.append(f'<path d="M{x(tp):.1f} {TOP}V{TOP + HEIGHT}" stroke="#eee"/>')
        out.append(f'<text x="{x(tp) - 4:.0f}" y="{TOP + HEIGHT + 20}" {FONT}>{tp}</text>')
    for speedup in range(0, int(top) + 1):
        out.append(f'<path d="M{LEFT} {y(speedup):.1f}H{LEFT + WIDTH}" stroke="#eee"/>')
        out.append(f'<text x="{LEFT - 20}" y="{y(speedup) + 4:.0f}" {FONT}>{speedup}</text>')
    out.append(f'<text x="{LEFT + WIDTH / 2 - 20:.0f}" y="{TOP + HEIGHT + 44}" {FONT}>ranks</text>')
    out.append(f'<path d="M{x(1):.1f} {y(1):.1f}L{x(most):.1f} {y(most):.1f}" stroke="#888" stroke-dasharray="6 4"/>')
    prompts, modes = ([*dict.fromkeys(case[i] for case in cases)] for i in range(2))
    ends = sorted(cases.items(), key=lambda case: -case[1][-1][1])
    heights = spread([y(points[-1][1]) + 4 for _, points in ends], 16)
    for ((prompt, mode), points), height in zip(ends, heights):
        color = COLORS[prompts.index(prompt) % len(COLORS)]
        dash = DASHES[modes.index(mode) % len(DASHES)]
        path = " ".join(f"{x(tp):.1f},{y(s):.1f}" for tp, s, _ in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>')
        for tp, s, _ in points:
            out.append(f'<circle cx="{x(tp):.1f}" cy="{y(s):.1f}" r="3.5" fill="{color}"/>')
        _, speedup, share = points[-1]
        out.append(f'<path d="M{x(most) + 6:.1f} {y(speedup):.1f}L{LEFT + WIDTH + 14} {height - 4:.1f}H{LEFT + WIDTH + 40}" '
                   f'fill="none" stroke="{color}" stroke-dasharray="{dash}"/>')
        out.append(f'<text x="{LEFT + WIDTH + 46}" y="{height:.0f}" {FONT}>{prompt} {mode}: {speedup:.2f}, '
                   f'{100 * share:.1f} % in sums over ranks</text>')
    out.append("</svg>")
    with open(picture, "w", encoding="utf-8") as f:
        f.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
