#!/bin/sh
# Claude Code against a gateway: turntrace run tasks.jsonl --agent './claude.sh {prompt}' ...
# CONTEXT_WINDOW: tokens after which it compacts its context.
HOME=$(mktemp -d) && export HOME && trap 'rm -rf "$HOME"' EXIT
export CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 DISABLE_AUTOUPDATER=1
export CLAUDE_CODE_AUTO_COMPACT_WINDOW="${CONTEXT_WINDOW:-200000}"
export IS_SANDBOX=1 # it refuses to skip permissions as root without it
claude -p "$1" --model m --dangerously-skip-permissions
