// SPDX-License-Identifier: Apache-2.0
// JSON lines on stderr, by pino. Written at once: what an agent that is killed had said is what is looked for.

import { destination, type Logger, pino } from 'pino';
import type { AgentSettings } from './settings.ts';

export type AgentLog = Logger;

export function createAgentLog({ logLevel, nodeName }: Pick<AgentSettings, 'logLevel' | 'nodeName'>): AgentLog {
  return pino(
    {
      level: logLevel,
      base: { ...(nodeName !== '' && { node: nodeName }) },
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (level) => ({ level }) },
    },
    destination({ fd: 2, sync: true }),
  );
}
