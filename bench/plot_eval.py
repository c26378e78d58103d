"""Draws what `sluice eval --json` measured: scores, less those of dense on the same prompts, against density and against time to the
first token, one row of pictures a length, with 95% intervals; and prints the figures as a Markdown table.
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
    """rows: (x, change, low, high, number, colour). What falls below the scale lies on its edge, with its change."""
    x_top = max(1.0, 1.05 * max(r[0] for r in rows))
    shown = [r for r in rows if r[1] > -0.1]
    y_low, y_top = min(-0.01, *(r[2] for r in shown)), max(0.01, *(r[3] for r in shown))

    def x(v):
        return left + WIDTH * v / x_top

    def y(v):
        return top + HEIGHT * (1 - max(v - y_low, 0) / (y_top - y_low))
    out.append(f'<text x="{left}" y="{top - 10}" {FONT}>{title}</text>')
    for i in range(int(x_top * 5) + 1):
        out.append(f'<path d="M{x(i / 5):.1f} {top}V{top + HEIGHT}" stroke="#eee"/>')
        out.append(f'<text x="{x(i / 5) - 8:.0f}" y="{top + HEIGHT + 16}" {FONT}>{i / 5:.1f}</text>')
    for v in (y_low, -0.01, 0, 0.01, y_top):
        out.append(f'<path d="M{left} {y(v):.1f}H{left + WIDTH}" stroke="{"#eee" if v else "#bbb"}"/>')
        out.append(f'<text x="{left - 46}" y="{y(v) + 4:.0f}" {FONT}>{v:+.3f}</text>')
    out.append(f'<text x="{left + 60}" y="{top + HEIGHT + 32}" {FONT}>{what}</text>')
    for place, (v, change, low, high, number, colour) in enumerate(sorted(rows)):
        out.append(f'<path d="M{x(v):.1f} {y(low):.1f}V{y(high):.1f}" stroke="{colour}" opacity="0.6"/>')
        out.append(f'<circle cx="{x(v):.1f}" cy="{y(change):.1f}" r="3" fill="{colour}"/>')
        beside = f" {change:+.2f}" if change < y_low else ""
        out.append(f'<text x="{x(v) + 4:.0f}" y="{y(change) - 4 - 9 * (place % 3):.0f}" font-family="sans-serif" font-size="10" '
                   f'fill="{colour}">{number}{beside}</text>')


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
    policies = report["policies"]
    families = list(dict.fromkeys(map(family, policies)))
    colour = {p: COLOURS[families.index(family(p)) % len(COLOURS)] for p in policies}
    legend = TOP + ROW * len(lengths)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + 2 * COLUMN}" height="{legend + 16 * (len(policies) + 2) // 2 + 16}">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{LEFT}" y="24" {FONT}>{report["model"]} on {report["device"]}: score of {group} less that of dense, same prompts, '
           f'{report["samples"]} a task, 95% intervals</text>']
    for i, length in enumerate(lengths):
        rows = [r for r in report["rows"] if r["length"] == length and r["task"] == group and r["n"]]
        dense = next(r for r in rows if r["policy"] == policies[0])
        for column, key, base, what in ((0, "density", 1.0, "measured density"),
                                        (1, "ttft_ms", dense["ttft_ms"], "time to the first token, of dense")):
            panel(out, [(r[key] / base, r["change"] or 0.0, *(r["change_interval"] or (0.0, 0.0)),
                         policies.index(r["policy"]), colour[r["policy"]]) for r in rows],
                  LEFT + COLUMN * column, TOP + ROW * i, what, f"{length} tokens")
    for i, p in enumerate(policies):
        out.append(f'<text x="{LEFT + COLUMN * (i % 2)}" y="{legend + 16 * (i // 2)}" font-family="sans-serif" font-size="12" '
                   f'fill="{colour[p]}">{i}  {short(p)}</text>')
    out.append("</svg>")
    with open(picture, "w", encoding="utf-8") as f:
        f.write("\n".join(out) + "\n")
    table(report, groups)


if __name__ == "__main__":
    main()
