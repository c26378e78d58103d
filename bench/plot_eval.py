"""Draws what `sluice eval --json` measured: accuracy against density and against time to the first token, one row of pictures a
length, with 95% intervals; and prints the figures as a Markdown table.
usage: plot_eval.py EVAL.json PICTURE.svg [GROUP]      GROUP: all niah, all other, all, or a task [all other, where it is there]"""
import json
import re
import sys

LEFT, TOP, WIDTH, HEIGHT, ROW, COLUMN = 60, 70, 380, 200, 270, 470
FONT = 'font-family="sans-serif" font-size="12" fill="#222"'
COLOURS = ["#0a6", "#06c", "#c50", "#a0a", "#880", "#088"]


def short(policy):
    """dense@unix:/tmp/window.sock -> dense@window"""
    return re.sub(r"@.*?([^/]+?)(\.sock)?$", r"@\1", policy)


def family(policy):
    """Policies that one line joins: of one gate, gate rows and daemon, and another level."""
    return re.sub(r"^(abs|k|rel)[:=~][^/@]*", r"\1", short(policy))


def panel(out, rows, left, top, what, title):
    """rows: (x, y, low, high, policy)"""
    x_top = max(1.0, 1.05 * max(r[0] for r in rows))
    y_low = min(0.95, min(r[2] for r in rows))

    def x(v):
        return left + WIDTH * v / x_top

    def y(v):
        return top + HEIGHT * (1 - (v - y_low) / (1 - y_low))
    out.append(f'<text x="{left}" y="{top - 10}" {FONT}>{title}</text>')
    for i in range(int(x_top * 5) + 1):
        out.append(f'<path d="M{x(i / 5):.1f} {top}V{top + HEIGHT}" stroke="#eee"/>')
        out.append(f'<text x="{x(i / 5) - 8:.0f}" y="{top + HEIGHT + 16}" {FONT}>{i / 5:.1f}</text>')
    for i in range(6):
        s = y_low + (1 - y_low) * i / 5
        out.append(f'<path d="M{left} {y(s):.1f}H{left + WIDTH}" stroke="#eee"/>')
        out.append(f'<text x="{left - 42}" y="{y(s) + 4:.0f}" {FONT}>{s:.3f}</text>')
    out.append(f'<text x="{left + 60}" y="{top + HEIGHT + 32}" {FONT}>{what}</text>')
    families = sorted({family(r[4]) for r in rows})
    for f, colour in zip(families, COLOURS * len(families)):
        mine = sorted(r for r in rows if family(r[4]) == f)
        line = " ".join(f"{x(r[0]):.1f},{y(r[1]):.1f}" for r in mine)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" opacity="0.5"/>')
        for v, score, low, high, policy in mine:
            out.append(f'<path d="M{x(v):.1f} {y(low):.1f}V{y(high):.1f}" stroke="{colour}"/>')
            out.append(f'<circle cx="{x(v):.1f}" cy="{y(score):.1f}" r="3" fill="{colour}"><title>{policy}</title></circle>')
            out.append(f'<text x="{x(v) + 5:.0f}" y="{y(score) - 5:.0f}" font-family="sans-serif" font-size="9" fill="{colour}">'
                       f'{short(policy)}</text>')


def table(report, groups):
    cells = {(r["length"], r["task"], r["policy"]): r for r in report["rows"]}
    print("| length | policy | density | "
          + " | ".join(f"{g} | - dense" for g in groups) + " | TTFT | attention |")
    print("|---|---|---|" + "---|---|" * len(groups) + "---|---|")
    for length in dict.fromkeys(r["length"] for r in report["rows"]):
        dense = cells[length, groups[-1], report["policies"][0]]
        for policy in report["policies"]:
            last = cells[length, groups[-1], policy]
            line = [str(length), short(policy), f'{last["density"]:.3f}']
            for g in groups:
                r = cells[length, g, policy]
                line.append(f'{r["score"]:.3f} [{r["score_interval"][0]:.3f} {r["score_interval"][1]:.3f}] n={r["n"]}')
                line.append("" if policy == report["policies"][0] else
                            f'{r["change"]:+.4f} [{r["change_interval"][0]:+.4f} {r["change_interval"][1]:+.4f}]')
            for key in ("ttft_ms", "attention_ms"):
                line.append(f'{last[key]:.1f} ms ({dense[key] / last[key]:.2f}x)' if last[key] else "-")
            print("| " + " | ".join(line) + " |")


def main():
    source, picture = sys.argv[1:3]
    with open(source, encoding="utf-8") as f:
        report = json.load(f)
    tasks = list(dict.fromkeys(r["task"] for r in report["rows"]))
    groups = [g for g in ("all niah", "all other", "all") if g in tasks] or tasks
    group = sys.argv[3] if len(sys.argv) > 3 else "all other" if "all other" in tasks else groups[-1]
    lengths = list(dict.fromkeys(r["length"] for r in report["rows"]))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + 2 * COLUMN}" height="{TOP + ROW * len(lengths)}">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{LEFT}" y="24" {FONT}>{report["model"]} on {report["device"]}: score of {group}, '
           f'{report["samples"]} prompts a task, 95% intervals</text>']
    for i, length in enumerate(lengths):
        rows = [r for r in report["rows"] if r["length"] == length and r["task"] == group and r["n"]]
        dense = next(r for r in rows if r["policy"] == report["policies"][0])
        at = TOP + ROW * i
        for column, key, base, what in ((0, "density", 1.0, "measured density"),
                                        (1, "ttft_ms", dense["ttft_ms"], "time to the first token, of dense")):
            panel(out, [(r[key] / base, r["score"], *r["score_interval"], r["policy"]) for r in rows],
                  LEFT + COLUMN * column, at, what, f"{length} tokens")
    out.append("</svg>")
    with open(picture, "w", encoding="utf-8") as f:
        f.write("\n".join(out) + "\n")
    table(report, groups)


if __name__ == "__main__":
    main()
