#!/usr/bin/env bash
# The ssh server of the image's sshd stage, for the deepspeed launcher's pdsh. Works as any user; sessions are that user's.
#
#   bash launch/sshd.sh        listens on $SSH_PORT (2222) until it is ended
#
# $SSH_KEYS (/run/secrets/ssh) is a mounted folder with authorized_keys, the private key id_ed25519 that the launcher goes to
# the other hosts with, and, if there are to be the same ones at every start, ssh_host_ed25519_key and known_hosts.
set -euo pipefail
keys=${SSH_KEYS:-/run/secrets/ssh}
port=${SSH_PORT:-2222}

[ -r "$keys/authorized_keys" ] || {
  echo "error: $keys/authorized_keys is not there or not readable for $(id -un): mount a folder with the run's keys there, or name it in SSH_KEYS" >&2
  exit 2
}
umask 077
# In the home folder: sshd takes no keys from below a folder that others can write to, as /tmp.
own=~/.sshd
mkdir -p "$own" ~/.ssh

# ssh and sshd refuse files that others could write or read, as those of a mounted secret are: copies of our own.
cat "$keys/authorized_keys" > "$own/authorized_keys"
for name in id_ed25519 known_hosts; do
  [ ! -r "$keys/$name" ] || cat "$keys/$name" > ~/.ssh/"$name"
done
if [ -r "$keys/ssh_host_ed25519_key" ]; then
  cat "$keys/ssh_host_ed25519_key" > "$own/host_key"
else
  rm -f "$own/host_key"
  ssh-keygen -q -t ed25519 -N "" -f "$own/host_key"
fi

# A session starts with next to no environment; what the container was given (PATH, NCCL_..., HF_HOME, keys) holds in it too.
session=()
while IFS= read -r -d '' pair; do
  name=${pair%%=*}
  value=${pair#*=}
  case $name in HOME | USER | LOGNAME | SHELL | PWD | OLDPWD | SHLVL | TERM | _) continue ;; esac
  [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ && $value != *$'\n'* ]] || continue
  value=${value//\\/\\\\}
  session+=("$name=\"${value//\"/\\\"}\"")
done < <(env --null)

cat > "$own/sshd_config" <<CONFIG
Port $port
HostKey $own/host_key
AuthorizedKeysFile $own/authorized_keys
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowUsers $(id -un)
MaxStartups 256
X11Forwarding no
PrintMotd no
SetEnv ${session[*]}
CONFIG
[ "$(id -u)" -ne 0 ] || mkdir -p /run/sshd
echo "sshd listens on port $port for $(id -un)"
exec /usr/sbin/sshd -D -e -f "$own/sshd_config"
