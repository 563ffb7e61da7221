"""Synthetic clinical notes of three hospitals, and public text to warm a base model up on. No real people, no medical advice.

    python examples/hospitals/notes.py DIR [--seed 7]

writes, the same bytes every time for the same seed:

    DIR/<hospital>/{train,valid,test}.jsonl   records {"prompt": a short note, "response": diagnosis, plan and advice}
    DIR/public.txt                            passages of plain prose, one a line

A response follows from its note by rules. Some are shared, and every hospital could learn them alone: what urgency and history lead to. The
others tell diagnosis, treatment and advice from complaint and finding, and they belong to a speciality. The hospitals are skewed in size, in
the specialities they see, and in how they write: north in abbreviations, harbour in sentences, valley in a form. Valid and test are drawn as
train is, so each hospital also meets the other two's cases, too rarely to learn them well alone.

The public text has the words of the conditions, and letters of the same form as the responses, but no note, and it draws every phrase
independently: it can teach how a letter looks, not which treatment belongs to which finding.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Condition(NamedTuple):
    """One rule: who has this complaint with this finding has this diagnosis, and gets this treatment and advice."""

    complaint: str
    finding: str
    diagnosis: str
    treatment: str
    advice: str


class Speciality(NamedTuple):
    ward: str
    ages: tuple[int, int]
    conditions: tuple[Condition, ...]


class Hospital(NamedTuple):
    train: int  # records
    sees: dict[str, int]  # speciality -> weight, drawn before the condition
    write: Callable[["Case"], str]


class Case(NamedTuple):
    """The facts that a note states in its hospital's way."""

    speciality: Speciality
    condition: Condition
    age: int
    female: bool
    days: int
    severity: str
    history: str

    @property
    def patient(self) -> str:
        return (("boy", "girl") if self.age < 16 else ("man", "woman"))[self.female]


SPECIALITIES = {
    "cardiology": Speciality(
        "heart ward",
        (35, 90),
        (
            Condition("short of breath at night", "swollen ankles", "heart failure", "water tablets", "weigh yourself every morning"),
            Condition("chest pain on stairs", "clear heart trace", "angina", "nitrate spray", "rest when the pain comes"),
            Condition("racing heart", "uneven pulse", "atrial fibrillation", "rate control and blood thinner", "report any bleeding"),
            Condition("sharp chest pain", "rubbing heart sound", "pericarditis", "colchicine course", "lean forward to ease the pain"),
            Condition("fainting on effort", "loud murmur", "aortic stenosis", "valve assessment", "avoid heavy lifting"),
            Condition("morning headache", "narrow eye vessels", "high blood pressure", "pressure tablets", "eat less salt"),
        ),
    ),
    "respiratory": Speciality(
        "chest ward",
        (35, 90),
        (
            Condition("cough and fever", "crackles on one side", "pneumonia", "antibiotics and oxygen", "drink plenty of water"),
            Condition("short of breath walking", "wheeze on both sides", "chronic bronchitis", "inhaler and steroids", "stop smoking now"),
            Condition("heavy chest", "dull lung base", "pleural effusion", "chest drain", "sleep propped up"),
        ),
    ),
    "oncology": Speciality(
        "cancer ward",
        (35, 90),
        (
            Condition("cough with blood", "shadow on the film", "lung tumour", "scan and needle test", "keep a list of symptoms"),
            Condition("weight loss", "hard mass in the belly", "bowel tumour", "camera test and surgery", "take small meals often"),
            Condition("night sweats", "large neck glands", "lymphoma", "chemotherapy in cycles", "call at once with a fever"),
        ),
    ),
    "paediatrics": Speciality(
        "children's ward",
        (2, 12),
        (
            Condition("barking cough", "noisy breathing in", "croup", "single dose of syrup", "sit upright in cool air"),
            Condition("crying and fever", "red ear drum", "ear infection", "pain relief drops", "keep the ear dry"),
            Condition("vomiting", "dry mouth", "stomach infection", "rehydration salts", "offer sips every few minutes"),
        ),
    ),
    "orthopaedics": Speciality(
        "bone ward",
        (10, 85),
        (
            Condition("fall on the hand", "bent wrist", "wrist fracture", "plaster cast", "raise the arm on a pillow"),
            Condition("twisted foot", "bruised ankle", "ankle sprain", "strapping and ice", "walk with a stick"),
            Condition("groin pain on walking", "stiff hip", "hip arthritis", "exercise class", "swim twice a week"),
        ),
    ),
}
HISTORIES = {  # history -> advice, whatever the condition
    "none": "no further steps",
    "diabetes": "check the sugar daily",
    "kidney disease": "repeat kidney tests",
    "drug allergy": "wear an allergy bracelet",
    "poor sight": "ask for large print",
}
SEVERITIES = {  # severity -> what happens next, in which ward
    "mild": "phone call from the {ward} in 2 weeks",
    "moderate": "visit to the {ward} in 5 days",
    "severe": "admission to the {ward} today",
}


def north(case: Case) -> str:
    past = {"none": "nil", "diabetes": "DM", "kidney disease": "CKD", "drug allergy": "ADR", "poor sight": "VA"}[case.history]
    score = {"mild": "1", "moderate": "4", "severe": "8"}[case.severity]
    about = case.condition
    return f"{case.age}{'MF'[case.female]}, {case.days}/7 {about.complaint}. O/E {about.finding}. PMH {past}. NEWS {score}."


def harbour(case: Case) -> str:
    past = "There is no past history" if case.history == "none" else f"There is known {case.history}"
    looks = {"mild": "comfortable", "moderate": "uneasy", "severe": "very unwell"}[case.severity]
    about = f"{case.condition.complaint} for {case.days} days. We noted {case.condition.finding}"
    return f"This {case.age}-year-old {case.patient} reports {about}. {past}. The patient looks {looks}."


def valley(case: Case) -> str:
    past = {"none": "-", "diabetes": "sugar", "kidney disease": "kidneys", "drug allergy": "allergy", "poor sight": "sight"}[case.history]
    triage = {"mild": "green", "moderate": "amber", "severe": "red"}[case.severity]
    about = case.condition
    return f"{case.patient} {case.age}y | {about.complaint} {case.days}d | exam: {about.finding} | hx: {past} | triage: {triage}"


HOSPITALS = {
    "north": Hospital(900, {"cardiology": 88, "respiratory": 3, "oncology": 3, "paediatrics": 3, "orthopaedics": 3}, north),
    "harbour": Hospital(500, {"cardiology": 6, "respiratory": 44, "oncology": 44, "paediatrics": 3, "orthopaedics": 3}, harbour),
    "valley": Hospital(300, {"cardiology": 6, "respiratory": 3, "oncology": 3, "paediatrics": 44, "orthopaedics": 44}, valley),
}
VALID, TEST = 40, 80  # records of each hospital


def response(case: Case) -> str:
    plan = SEVERITIES[case.severity].format(ward=case.speciality.ward)
    about = case.condition
    return (
        f"Diagnosis: {case.severity} {about.diagnosis}. Plan: {about.treatment}; {plan}. Advice: {about.advice}; {HISTORIES[case.history]}."
    )


def draw_case(hospital: Hospital, rng: random.Random) -> Case:
    (name,) = rng.choices(list(hospital.sees), list(hospital.sees.values()))
    speciality = SPECIALITIES[name]
    return Case(
        speciality=speciality,
        condition=rng.choice(speciality.conditions),
        age=rng.randint(*speciality.ages),
        female=rng.random() < 0.5,
        days=rng.randint(2, 9),
        severity=rng.choice(list(SEVERITIES)),
        history=rng.choice(list(HISTORIES)),
    )


def records(hospital: Hospital, rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """The three splits of a hospital; no note stands twice."""
    notes: dict[str, str] = {}
    while len(notes) < hospital.train + VALID + TEST:
        case = draw_case(hospital, rng)
        notes[hospital.write(case)] = response(case)
    drawn = [{"prompt": prompt, "response": answer} for prompt, answer in notes.items()]
    return {"train": drawn[: hospital.train], "valid": drawn[hospital.train : -TEST], "test": drawn[-TEST:]}


def passage(rng: random.Random) -> str:
    """A few sentences in which nothing belongs together."""
    conditions = [c for s in SPECIALITIES.values() for c in s.conditions]

    def some(field: str) -> str:
        return str(getattr(rng.choice(conditions), field))

    ward = rng.choice(list(SPECIALITIES.values())).ward
    severity, other = rng.choices(list(SEVERITIES), k=2)
    plan = SEVERITIES[other].format(ward=ward)
    history, steps = rng.choice(list(HISTORIES)), rng.choice(list(HISTORIES.values()))
    age, days = rng.randint(2, 90), rng.randint(2, 9)
    who = f"{age}-year-old {rng.choice(('boy', 'girl') if age < 16 else ('man', 'woman'))}"
    read = some("treatment")
    sentences = [
        f"The library has a book about {some('diagnosis')} and a film about {some('treatment')}.",
        f"A leaflet on {read} hangs near the {ward}. The leaflet on {read} is new.",
        f"Somebody asked about {some('complaint')}, and {days} days later about {some('finding')}.",
        f"The picture shows {some('finding')}; the next one shows {some('finding')}.",
        f"A sign says: {some('advice')}; {some('advice')}.",
        f"The students learn the words {severity}, {history} and {some('diagnosis')}.",
        f"A letter spoke of a {plan}. On the back stood: {steps}.",
        f"The story is about {severity} {some('diagnosis')} and known {history}.",
        f"A poster lists {some('complaint')}, {some('finding')} and {some('treatment')}.",
        f"The nurse noted the weather: {rng.choice(('green hills', 'red sky', 'amber light', 'rain'))} for {days} days.",
        f"The visitor looks {rng.choice(('comfortable', 'uneasy', 'very unwell', 'at the clock'))} and reports no past history.",
    ]
    told = " ".join(rng.sample(sentences, 2))
    letter = f"Diagnosis: {severity} {some('diagnosis')}. Plan: {some('treatment')}; {plan}. Advice: {some('advice')}; {steps}."
    return f"This {who} tells of {some('complaint')} for {days} days and shows {some('finding')}. {told} Specimen letter: {letter}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write synthetic notes of three hospitals, and public text, into a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--passages", type=int, default=4000, help="passages of public text")
    args = parser.parse_args()
    for name, hospital in HOSPITALS.items():
        (args.folder / name).mkdir(parents=True, exist_ok=True)
        for split, drawn in records(hospital, random.Random(f"{args.seed} {name}")).items():
            lines = "".join(json.dumps(record) + "\n" for record in drawn)
            (args.folder / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    rng = random.Random(f"{args.seed} public")
    (args.folder / "public.txt").write_text("".join(passage(rng) + "\n" for _ in range(args.passages)), encoding="utf-8")


if __name__ == "__main__":
    main()
