#!/usr/bin/env bash
# s3s-fs 0.14.1: If-None-Match: * is check-then-act. Two puts in turn behave; of eight at the same moment several
# are told that they created the object, and the body of one of them stands.
#
# Expected: of any number of puts of one key with If-None-Match: *, one is answered 200 and the others 412.
# Needs: cargo, python3 with venv. Exits with 1 where the behaviour is another one.
set -euo pipefail
work=$(mktemp -d)
server=
trap '[ -n "$server" ] && kill "$server" 2>/dev/null; rm -rf "$work"' EXIT
cd "$work"
cargo install --quiet s3s-fs --version 0.14.1 --features binary --root "$work/tools"
python3 -m venv venv
venv/bin/pip install --quiet botocore==1.43.117
mkdir -p data/bucket
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
tools/bin/s3s-fs --host 127.0.0.1 --port "$port" --access-key key --secret-key secret data >log 2>&1 &
server=$!
tools/bin/s3s-fs --version
cat >race.py <<'PY'
import socket, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import botocore.config, botocore.session
from botocore.exceptions import ClientError

endpoint = f"http://127.0.0.1:{sys.argv[1]}"
for _ in range(100):
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[1]))).close()
        break
    except OSError:
        time.sleep(0.1)
client = botocore.session.get_session().create_client(
    "s3", region_name="us-east-1", endpoint_url=endpoint, aws_access_key_id="key", aws_secret_access_key="secret",
    config=botocore.config.Config(max_pool_connections=8, retries={"total_max_attempts": 1}),
)

def create(key, body):
    try:
        client.put_object(Bucket="bucket", Key=key, Body=body, IfNoneMatch="*")
        return 200
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"]

print("two in turn:", create("turn", b"1"), create("turn", b"2"))
assert create("turn", b"3") == 412
rounds = []
for number in range(20):
    start = threading.Barrier(8)
    def racer(who):
        start.wait()
        return create(f"race{number}", bytes([who]) * (1 << 20))
    with ThreadPoolExecutor(8) as pool:
        rounds.append(list(pool.map(racer, range(8))).count(200))
print("answered 200 of eight at once, twenty times:", rounds)
sys.exit(0 if max(rounds) > 1 else 1)
PY
venv/bin/python race.py "$port"
