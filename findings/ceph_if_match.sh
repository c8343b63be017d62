#!/usr/bin/env bash
# Ceph's gateway 16.2.15 (Debian 12): a put with If-Match and the object's ETag as it was given, in quotes, is
# answered 412; without the quotes it is answered 200. Other servers take both. RFC 9110 wants the quotes.
#
# Expected: 200 for the ETag in quotes.
# Needs: Debian 12's ceph-mon, ceph-mgr, ceph-osd, ceph-common, radosgw (--no-install-recommends is enough),
# python3 with venv. Starts one node on loopback, in memory. Exits with 1 where the behaviour is another one.
set -euo pipefail
work=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait; rm -rf "$work"' EXIT
cd "$work"
free() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
port=$(free) mon=$(free) fsid=$(cat /proc/sys/kernel/random/uuid) disk=$(cat /proc/sys/kernel/random/uuid)
mkdir mon mgr osd
export CEPH_CONF=$work/ceph.conf
cat >"$CEPH_CONF" <<CONF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$mon/0]
auth cluster required = none
auth service required = none
auth client required = none
ms bind msgr1 = false
ms mon client mode = crc secure
run dir = $work
admin socket = $work/\$name.asok
log file = $work/\$name.log
pid file = $work/\$name.pid
mon data = $work/mon
mgr data = $work/mgr
osd data = $work/osd
osd objectstore = memstore
memstore device bytes = 1073741824
osd class load list = *
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
rgw frontends = beast endpoint=127.0.0.1:$port
CONF
python3 -m venv venv
venv/bin/pip install --quiet botocore==1.43.117
monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$mon]" monmap >/dev/null
ceph-mon -i a --mkfs --monmap monmap
ceph-mon -f -i a >/dev/null 2>&1 & pids+=($!)
ceph-mgr -f -i x >/dev/null 2>&1 & pids+=($!)
ceph-osd -i 0 --mkfs --osd-uuid "$disk" >/dev/null 2>&1
timeout 60 ceph osd new "$disk" >/dev/null
ceph-osd -f -i 0 >/dev/null 2>&1 & pids+=($!)
timeout 120 radosgw-admin user create --uid=u --display-name=u --access-key=key --secret=secret >/dev/null
radosgw -f -n client.admin >/dev/null 2>&1 & pids+=($!)
radosgw --version
cat >match.py <<'PY'
import socket, sys, time
import botocore.config, botocore.session
from botocore.exceptions import ClientError

port = int(sys.argv[1])
for _ in range(600):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
        break
    except OSError:
        time.sleep(0.1)
client = botocore.session.get_session().create_client(
    "s3", region_name="us-east-1", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id="key",
    aws_secret_access_key="secret", config=botocore.config.Config(s3={"addressing_style": "path"}),
)
client.create_bucket(Bucket="bucket")

def put(body, etag):
    try:
        client.put_object(Bucket="bucket", Key="x", Body=body, IfMatch=etag)
        return 200
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"]

etag = client.put_object(Bucket="bucket", Key="x", Body=b"1")["ETag"]
quoted, bare = put(b"2", etag), put(b"3", etag.strip('"'))
stale = put(b"4", etag.strip('"'))
print(f"If-Match with the ETag in quotes: {quoted}; without them: {bare}; a stale one without them: {stale}")
sys.exit(0 if (quoted, bare, stale) == (412, 200, 412) else 1)
PY
venv/bin/python match.py "$port"
