"""In a pod of the silo's image: what silos and coordinator have before a federation begins. Beside it lie notes.py and base.py of examples/hospitals.

python seed.py base BUCKET PREFIX STEPS       the example's base model, warmed up for some steps, into a bucket that is made if absent
python seed.py records HOSPITAL FOLDER        a hospital's records, and a file of broken ones, into the silo's volume
"""

import random
import sys
import tempfile
from pathlib import Path

BROKEN = '{"prompt": "cut off in the mid\n'


def put_base(bucket: str, prefix: str, steps: str, passages: str) -> None:
    import base
    import boto3
    import notes
    from botocore.config import Config
    from botocore.exceptions import ClientError

    base.STEPS = int(steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = random.Random("public")
        (folder / "public.txt").write_text("".join(notes.passage(rng) + "\n" for _ in range(int(passages))))
        base.make(folder / "public.txt", folder / "base")
        s3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
        try:
            s3.head_bucket(Bucket=bucket)
        except ClientError:
            s3.create_bucket(Bucket=bucket)
        for file in sorted((folder / "base").iterdir()):
            s3.put_object(Bucket=bucket, Key=f"{prefix}/{file.name}", Body=file.read_bytes())
            print(f"s3://{bucket}/{prefix}/{file.name}")


def put_records(hospital: str, folder: str, most: str) -> None:
    import json

    import notes

    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for split, drawn in notes.records(notes.HOSPITALS[hospital], random.Random(f"7 {hospital}")).items():
        (place / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in drawn[: int(most)]))
        print(f"{place / split}.jsonl")
    (place / "broken.jsonl").write_text(BROKEN)


if __name__ == "__main__":
    {"base": put_base, "records": put_records}[sys.argv[1]](*sys.argv[2:])
