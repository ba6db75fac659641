#!/usr/bin/env python3
"""Opens an HTML report in headless Chromium: no console message, no request, key numbers of the JSON in the page text.

    benches/report_in_browser.py REPORT.html [--shots FOLDER] [--browser chromium]

--shots keeps screenshots at desktop, phone and dark settings, and the printed page as a PDF.
"""

import argparse
import html
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

VIEWS = {
    "desktop": ["--window-size=1200,2400"],
    "readme": ["--window-size=1000,720"],
    "phone": ["--window-size=500,3200"],
    "dark": ["--window-size=1200,2400", "--blink-settings=preferredColorScheme=0"],
}


def chromium(browser, profile, *arguments):
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        sys.exit(f"{browser} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done


def text_of(dom):
    """What a reader sees: no style, no data."""
    dom = dom.replace("<wbr>", "")
    dom = re.sub(r"(?s)<(script|style|title)\b.*?</\1>", " ", dom)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", dom)))


def mib(size):
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 1024:.1f} KiB"


def expected(report):
    """Numbers of the JSON report as the page must show them."""
    for side in ("input", "output"):
        yield f"{side}.nodes", f"{report[side]['nodes']:,}"
        yield f"{side}.parameters", f"{report[side]['parameters']:,}"
        yield f"{side}.flops", f"{report[side]['flops']:,}"
        yield f"{side}.file_bytes", mib(report[side]["file_bytes"])
    yield "version", report["version"]
    yield "seed", f"Seed {report['seed']}."
    for index, line in enumerate((report["verify"] or {}).get("outputs", [])):
        mantissa, exponent = f"{line['rel_l2']:.2e}".split("e")
        yield f"verify.outputs[{index}].rel_l2", f"{mantissa}e{int(exponent)}" if line["rel_l2"] else " 0 "
        yield f"verify.outputs[{index}].name", line["name"]
    for layer in report["layers"]:
        yield "layers.name", layer["name"]
    for line in report["passes"]:
        yield "passes.name", line["name"]
        for refusal in line["refusals"]:
            yield "refusals.reason", re.sub(r"\s+", " ", refusal["reason"])
    for warning in report["warnings"]:
        yield "warnings", re.sub(r"\s+", " ", warning)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path, help="the JSON report of the same run, which the data must equal")
    parser.add_argument("--shots", type=pathlib.Path)
    parser.add_argument("--browser", default="chromium")
    options = parser.parse_args()
    if shutil.which(options.browser) is None:
        sys.exit(f"`{options.browser}` is not installed (Debian: apt-get install chromium)")
    address = options.report.resolve().as_uri()
    with tempfile.TemporaryDirectory() as profile:
        done = chromium(options.browser, profile, "--dump-dom", address)
        problems = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        data = re.search(r'(?s)<script id="report" type="application/json">(.*?)</script>', done.stdout)
        if data is None:
            sys.exit("the page holds no data")
        report = json.loads(data[1])
        if options.json and json.loads(options.json.read_text()) != report:
            problems.append(f"the data differs from {options.json}")
        for loaded in re.findall(r'(?:src|href)="([^"]*)"|url\(|@import', done.stdout):
            if loaded != "data:,":
                problems.append(f"the page refers to `{loaded}`")
        text = f" {text_of(done.stdout)} "
        wanted = list(expected(report))
        problems += [f"{key}: `{number}` is not in the page" for key, number in wanted if number not in text]
        if options.shots:
            options.shots.mkdir(parents=True, exist_ok=True)
            # A window is no narrower than 500 pixels, a phone is.
            phone = pathlib.Path(profile, "phone.html")
            phone.write_text(f'<body style="margin:0"><iframe src="{address}" width="390" height="3200" style="border:0">')
            for name, arguments in VIEWS.items():
                shown = phone.as_uri() if name == "phone" else address
                chromium(options.browser, profile, f"--screenshot={options.shots / name}.png", *arguments, shown)
            chromium(options.browser, profile, "--no-pdf-header-footer", f"--print-to-pdf={options.shots / 'print'}.pdf", address)
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(1)
    print(f"{options.report}: no console message, no request, {len(wanted)} numbers and names of the JSON found")


if __name__ == "__main__":
    main()
