#!/usr/bin/env python3
"""Analyses daily weather observations and writes a signed report.

    report.py [DATA.csv [OUTPUT-DIRECTORY]]        default: /work/data/weather.csv /work/out

A tool step as an agent would write it: it prints a plan, reports each step, and ends with an exit code. It needs only
Python's standard library.

The report is signed with HMAC-SHA256 under a token that is read from the file named by API_TOKEN_FILE. The token is never
printed or written. Its owner can check the signature, which proves that the token arrived and what it was used for.

Exit codes: 0 done, 1 the data is not usable, 2 the data or the token is missing.
"""

import csv
import hashlib
import hmac
import json
import math
import os
import platform
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

COLUMNS = ["location", "date", "precipitation", "temp_max", "temp_min", "wind", "weather"]
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
# The World Meteorological Organization's definition, in millimetres.
WET_DAY_MM = 1.0
# Real tokens are short: a larger file is a mistake and is not read completely.
TOKEN_LIMIT = 4096
# With fewer days, statistics by month and location mean nothing.
FEWEST_DAYS = 365
LAST_LAG = 5
# With about 1,400 days, correlations up to 0.05 come from chance alone; the inertia of weather doubles that.
NOISE = 0.1


class Refusal(Exception):
    """An error that ends the program; the message contains the remedy."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Day:
    """One day at one place: millimetres, degrees Celsius, metres per second."""

    location: str
    date: date
    rain: float
    warmest: float
    coldest: float
    wind: float

    @property
    def wet(self):
        return self.rain >= WET_DAY_MM


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


def read_token():
    """Returns the token without a line end at its end."""
    path = os.environ.get("API_TOKEN_FILE")
    if not path:
        raise Refusal("API_TOKEN_FILE is not set: start the sandbox with `--secret API_TOKEN=env:API_TOKEN`", 2)
    try:
        with open(path, "rb") as source:
            token = source.read(TOKEN_LIMIT + 1)
    except OSError as error:
        raise Refusal(f"the token cannot be read from {path}: {error.strerror}", 2) from error
    token = token.rstrip(b"\r\n")
    if not 0 < len(token) <= TOKEN_LIMIT:
        raise Refusal(f"the token in {path} is empty or longer than {TOKEN_LIMIT} bytes", 2)
    return token


def parse_day(row):
    day = Day(
        location=row["location"].strip(),
        date=date.fromisoformat(row["date"]),
        rain=float(row["precipitation"]),
        warmest=float(row["temp_max"]),
        coldest=float(row["temp_min"]),
        wind=float(row["wind"]),
    )
    if not all(math.isfinite(value) for value in (day.rain, day.warmest, day.coldest, day.wind)):
        raise ValueError("a number is not finite")
    if not day.location or day.rain < 0 or day.wind < 0:
        raise ValueError("no location, or negative rain or wind")
    if day.coldest > day.warmest:
        raise ValueError("its minimum is above its maximum")
    return day


def load(path):
    """Returns the days by location, in order, and the digest of the file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        missing = f"cannot read the data in {path} ({error.strerror}): copy it in with `--copy-in FILE:{path}`"
        raise Refusal(missing, 2) from error
    try:
        reader = csv.DictReader(raw.decode("utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise Refusal(f"{path} is not UTF-8 text: {error}", 1) from error
    if reader.fieldnames != COLUMNS:
        raise Refusal(f"the first line of {path} is not {','.join(COLUMNS)}", 1)
    days, unusable = {}, 0
    for row in reader:
        try:
            day = parse_day(row)
        except (ValueError, TypeError, AttributeError) as error:
            unusable += 1
            warn(f"line {reader.line_num} is left out: {error}")
            continue
        if days.setdefault((day.location, day.date), day) is not day:
            warn(f"line {reader.line_num} is left out: {day.location} has another {day.date}")
    if unusable * 100 > len(days):
        raise Refusal(f"{unusable} lines of {path} cannot be used: this is not the expected data", 1)
    places = defaultdict(list)
    for key in sorted(days):
        places[key[0]].append(days[key])
    for place, series in list(places.items()):
        if len(series) < FEWEST_DAYS:
            warn(f"{place} is left out: {len(series)} days are too few")
            del places[place]
    if not places:
        raise Refusal(f"no place in {path} has {FEWEST_DAYS} days", 1)
    return dict(places), hashlib.sha256(raw).hexdigest()


def longest_run(series, wanted):
    """Returns the longest run of days for which `wanted` holds; a day without data ends a run."""
    best, start, previous = (0, None), None, None
    for day in series:
        if not wanted(day):
            start = None
        elif start is None or day.date - previous != timedelta(days=1):
            start = day.date
        if start is not None:
            best = max(best, ((day.date - start).days + 1, start), key=lambda run: run[0])
        previous = day.date
    return {"days": best[0], "from": best[1].isoformat() if best[1] else None}


def by_month(series):
    months = defaultdict(list)
    for day in series:
        months[day.date.month].append(day)
    return [
        {
            "month": MONTHS[month - 1],
            "warmest_mean_c": round(statistics.fmean(day.warmest for day in days), 1),
            "coldest_mean_c": round(statistics.fmean(day.coldest for day in days), 1),
            "rain_mm": round(sum(day.rain for day in days) / len({day.date.year for day in days}), 1),
            "wet_share": round(statistics.fmean(day.wet for day in days), 3),
        }
        for month, days in sorted(months.items())
    ]


def heavy_rain(series):
    """Returns the share of all rain that falls on the wettest twentieth of wet days."""
    wet = [day.rain for day in series if day.wet]
    if len(wet) < 20:
        return None
    threshold = statistics.quantiles(wet, n=20)[-1]
    share = sum(rain for rain in wet if rain >= threshold) / sum(day.rain for day in series)
    return {"threshold_mm": round(threshold, 1), "share_of_rain": round(share, 3)}


def consecutive(series):
    return [(a, b) for a, b in zip(series, series[1:]) if b.date - a.date == timedelta(days=1)]


def persistence(series):
    """Returns the chance of a wet day after a wet and after a dry one; null if there is no such day."""
    after = {True: [], False: []}
    for today, tomorrow in consecutive(series):
        after[today.wet].append(tomorrow.wet)
    chance = {wet: round(statistics.fmean(cases), 3) if cases else None for wet, cases in after.items()}
    return {"wet_after_wet": chance[True], "wet_after_dry": chance[False]}


def forecasts(series):
    """Estimates the chance of a wet day from all years but the last, and scores the estimates on the last one.

    Brier score: the mean squared difference between the forecast chance and the outcome; lower is better.
    """
    last = max(day.date.year for day in series)
    pairs = consecutive(series)
    learn = [pair for pair in pairs if pair[1].date.year < last]
    score = [pair for pair in pairs if pair[1].date.year == last]
    if len(learn) < FEWEST_DAYS or not score:
        return None
    seasons, chains = defaultdict(list), defaultdict(list)
    for today, tomorrow in learn:
        seasons[tomorrow.date.month].append(tomorrow.wet)
        chains[tomorrow.date.month, today.wet].append(tomorrow.wet)
    base = statistics.fmean(tomorrow.wet for _, tomorrow in learn)

    def chance(observed):
        # Two imagined days at the base rate pull the estimate of a month with few cases towards the average.
        return (sum(observed) + 2 * base) / (len(observed) + 2)

    models = {
        "always the average": lambda today, tomorrow: base,
        "as today": lambda today, tomorrow: float(today.wet),
        "by season": lambda today, tomorrow: chance(seasons[tomorrow.date.month]),
        "by season and today": lambda today, tomorrow: chance(chains[tomorrow.date.month, today.wet]),
    }
    brier = {
        name: round(statistics.fmean((model(*pair) - pair[1].wet) ** 2 for pair in score), 4)
        for name, model in models.items()
    }
    return {"year": last, "brier": brier, "best": min(brier, key=brier.get)}


def describe(series):
    rain = defaultdict(float)
    for day in series:
        rain[day.date.year] += day.rain
    hottest = max(series, key=lambda day: day.warmest)
    coldest = min(series, key=lambda day: day.coldest)
    wettest = max(series, key=lambda day: day.rain)
    return {
        "from": series[0].date.isoformat(),
        "to": series[-1].date.isoformat(),
        "days": len(series),
        "days_missing": (series[-1].date - series[0].date).days + 1 - len(series),
        "rain_by_year_mm": {str(year): round(total, 1) for year, total in sorted(rain.items())},
        "wet_share": round(statistics.fmean(day.wet for day in series), 3),
        "longest_dry": longest_run(series, lambda day: not day.wet),
        "longest_wet": longest_run(series, lambda day: day.wet),
        "hottest": {"date": hottest.date.isoformat(), "warmest_c": hottest.warmest},
        "coldest": {"date": coldest.date.isoformat(), "coldest_c": coldest.coldest},
        "wettest": {"date": wettest.date.isoformat(), "rain_mm": wettest.rain},
        "heavy_rain": heavy_rain(series),
        "persistence": persistence(series),
        "months": by_month(series),
        "forecast": forecasts(series),
    }


def anomalies(series):
    """Returns by how much each day was warmer than its month usually is.

    Without this, any two places correlate by season alone.
    """
    usual = defaultdict(list)
    for day in series:
        usual[day.date.month].append(day.warmest)
    usual = {month: statistics.fmean(values) for month, values in usual.items()}
    return {day.date: day.warmest - usual[day.date.month] for day in series}


def lagged_correlations(here, there):
    """Returns correlations of `here` with `there`, by the number of days later, if enough days overlap."""
    found = {}
    for lag in range(LAST_LAG + 1):
        later = timedelta(days=lag)
        pairs = [(value, there[day + later]) for day, value in here.items() if day + later in there]
        if len(pairs) >= FEWEST_DAYS:
            found[str(lag)] = round(statistics.correlation(*zip(*pairs)), 3)
    return found


def compare(places):
    """Compares unusual warmth in one place with unusual warmth in another, on the same day or some days later."""
    unusual = {place: anomalies(series) for place, series in places.items()}
    return [
        {"first": first, "second": second, "by_lag_days": lagged_correlations(unusual[first], unusual[second])}
        for first in sorted(places)
        for second in sorted(places)
        if first != second
    ]


def percent(share):
    return "–" if share is None else f"{share:.0%}"


def place_section(place, found):
    rain = statistics.fmean(found["rain_by_year_mm"].values())
    yield from (
        "",
        f"## {place}",
        "",
        f"- {found['from']} to {found['to']}, {found['days_missing']} days missing; {rain:.0f} mm a year, "
        f"{percent(found['wet_share'])} of days wet (at least {WET_DAY_MM:g} mm)",
        f"- longest dry spell {found['longest_dry']['days']} days from {found['longest_dry']['from']}, "
        f"longest wet spell {found['longest_wet']['days']} days from {found['longest_wet']['from']}",
        f"- hottest {found['hottest']['warmest_c']} °C on {found['hottest']['date']}, "
        f"coldest {found['coldest']['coldest_c']} °C on {found['coldest']['date']}, "
        f"wettest {found['wettest']['rain_mm']} mm on {found['wettest']['date']}",
        f"- a wet day follows a wet one in {percent(found['persistence']['wet_after_wet'])} of cases, "
        f"a dry one in {percent(found['persistence']['wet_after_dry'])}",
    )
    if heavy := found["heavy_rain"]:
        yield (
            f"- the wettest twentieth of wet days (from {heavy['threshold_mm']} mm) brings "
            f"{percent(heavy['share_of_rain'])} of the rain"
        )
    if forecast := found["forecast"]:
        scores = ", ".join(f"{name} {score:.3f}" for name, score in forecast["brier"].items())
        yield f"- {forecast['year']}'s wet days forecast from the years before (Brier score, lower is better): {scores}"
    yield from ("", "| month | min °C | max °C | rain mm | wet days |", "|---|--:|--:|--:|:--|")
    for month in found["months"]:
        bar = "█" * round(month["wet_share"] * 20)
        yield (
            f"| {month['month']} | {month['coldest_mean_c']} | {month['warmest_mean_c']} | {month['rain_mm']} "
            f"| {bar} {percent(month['wet_share'])} |"
        )


def markdown(report):
    data, environment = report["data"], report["environment"]
    lines = [
        "# Weather report",
        "",
        f"{data['days']} days from `{data['file']}` (SHA-256 `{data['sha256'][:16]}…`), analysed on Linux "
        f"{environment['kernel']} with Python {environment['python']}.",
    ]
    for place, found in report["places"].items():
        lines += place_section(place, found)
    lines += ["", "## Does unusual warmth travel? (correlation)", ""]
    for pair in report["comparison"]:
        if pair["by_lag_days"]:
            lag, strongest = max(pair["by_lag_days"].items(), key=lambda item: abs(item[1]))
            verdict = f"none beyond chance, at most {strongest:+.2f}"
            if abs(strongest) > NOISE:
                verdict = f"{strongest:+.2f}, {lag} days later"
            lines.append(f"- from {pair['first']} to {pair['second']}, within {LAST_LAG} days: {verdict}")
    return "\n".join(lines) + "\n"


def write(directory, files, token):
    """Writes the files and then their signatures; refuses if a file contains the token."""
    signatures = ""
    for name, content in files.items():
        if token in content:
            raise Refusal(f"{name} would contain the token: nothing is written", 1)
        signatures += f"{hmac.new(token, content, hashlib.sha256).hexdigest()}  {name}\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name).write_bytes(content)
        (directory / "report.hmac").write_text(signatures, encoding="ascii")
    except OSError as error:
        raise Refusal(f"the report cannot be written to {directory}: {error.strerror}", 2) from error


def main(arguments):
    if len(arguments) > 2:
        raise Refusal("usage: report.py [DATA.csv [OUTPUT-DIRECTORY]]", 2)
    data = Path(arguments[0] if arguments else "/work/data/weather.csv")
    output = Path(arguments[1] if len(arguments) > 1 else "/work/out")
    plan = ["take the token", "read the data", "describe each place", "compare the places", "write and sign the report"]
    print("plan: " + ", ".join(plan), flush=True)

    def done(step, outcome):
        print(f"[{step}/{len(plan)}] {plan[step - 1]}: {outcome}", flush=True)

    token = read_token()
    done(1, "received")
    places, digest = load(data)
    days = sum(len(series) for series in places.values())
    done(2, f"{days} days, {', '.join(places)}")
    found = {place: describe(series) for place, series in places.items()}
    for place, facts in found.items():
        if facts["days_missing"]:
            warn(f"{place} lacks {facts['days_missing']} days")
    done(3, "; ".join(f"{place} is wet on {percent(facts['wet_share'])} of days" for place, facts in found.items()))
    comparison = compare(places)
    done(4, f"{len(comparison)} comparisons")
    environment = {
        "kernel": os.uname().release,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "uid": os.getuid(),
    }
    report = {
        "data": {"file": data.name, "sha256": digest, "days": days},
        "environment": environment,
        "places": found,
        "comparison": comparison,
    }
    files = {
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode(),
        "report.md": markdown(report).encode(),
    }
    write(output, files, token)
    done(5, f"{', '.join(files)} and report.hmac in {output}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(refusal.code)
