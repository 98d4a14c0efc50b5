// SPDX-License-Identifier: Apache-2.0
// A CNI request as the target of an attach, and the decision whether it is enrolled.

import { statSync } from 'node:fs';
import { attachmentKey } from '../attachments.ts';
import type { Request } from '../cni/dispatch.ts';
import { CniError, Code } from '../cni/errors.ts';
import type { Target } from '../datapath.ts';
import type { Native } from '../native.ts';
import {
  ANNOTATION,
  ANNOTATIONS_CAPABILITY,
  podAnnotations,
  type TrafficAnnotations,
  trafficAnnotations,
} from '../redirect/annotations.ts';
import { declaresCapability, isEgressLimited, isRateLimited, type RedirectConfig } from '../redirect/config.ts';
import { decideEnrolment, type Enrolment, podIdentity } from '../redirect/enrolment.ts';
import { mergeExclusions } from '../redirect/exclusions.ts';
import { selectPodInterface } from '../redirect/sandbox.ts';

export interface Decision {
  config: RedirectConfig;
  target: Target;
  reason: string;
}

/**
 * `agentAnswer`: what the agent said, where it was asked; undefined: nobody could be. Throws CniError 7, or 11 where the
 * agent would have to be asked.
 */
export function decide(
  native: Native,
  request: Request,
  netns: number,
  config: RedirectConfig,
  agentAnswer?: boolean,
): Decision {
  const { conf, ifname } = request;
  const annotations = podAnnotations(conf.runtimeConfig);
  const pod = podIdentity(request.args);
  const enrolment = settle(config, enrolmentOf(request, config, agentAnswer));
  const { role, reason } = enrolment;
  const wishes = role === 'pod' ? trafficAnnotations(annotations, config.podOverrides) : undefined;
  const { addresses } = selectPodInterface(conf.prevResult ?? { cniVersion: conf.cniVersion }, ifname, (sandbox) =>
    isSameNetns(native, sandbox, netns),
  );
  return {
    config: wishes === undefined ? config : withWishes(config, wishes),
    reason,
    target: {
      key: attachmentKey(native, conf.name, request.containerId, ifname),
      network: conf.name,
      containerId: request.containerId,
      ifname,
      netnsPath: request.netns,
      resultAddresses: addresses,
      pod: {
        name: pod?.name ?? '',
        namespace: pod?.namespace ?? '',
        uid: pod?.uid ?? '',
        serviceAccount: '',
      },
      role,
      strict: true,
      shaped: isRateLimited(conf.runtimeConfig),
      egressLimited: isEgressLimited(conf.runtimeConfig),
      bypassInbound: wishes?.bypassInbound ?? false,
    },
  };
}

/** Role "undecided": only the agent can say. Throws CniError 7. */
export function enrolmentOf(request: Request, config: RedirectConfig, agentAnswer?: boolean): Enrolment {
  return decideEnrolment(config, {
    pod: podIdentity(request.args),
    ifname: request.ifname,
    annotations: podAnnotations(request.conf.runtimeConfig),
    annotationsDeclared: declaresCapability(request.conf, ANNOTATIONS_CAPABILITY),
    ...(agentAnswer !== undefined && { agentAnswer }),
  });
}

/** The node's settings with what the pod asks for itself. Throws CniError 7. */
export function withWishes(config: RedirectConfig, { dnsCapture, exclude }: TrafficAnnotations): RedirectConfig {
  if (dnsCapture === true && config.proxy.ports.dns === 0) {
    throw new CniError(
      Code.INVALID_NETWORK_CONFIG,
      `invalid pod annotation ${ANNOTATION.dnsCapture}`,
      `${ANNOTATION.dnsCapture} = "true": proxy.ports.dns is 0, nobody would answer`,
    );
  }
  return {
    ...config,
    dnsCapture: dnsCapture ?? config.dnsCapture,
    exclude: mergeExclusions(config.exclude, exclude),
  };
}

/** Nobody can be asked: then the failure policy says whether the pod may start. */
function settle(config: RedirectConfig, enrolment: Enrolment): Enrolment & { role: Target['role'] } {
  const { role, reason } = enrolment;
  if (role !== 'undecided') return { role, reason };
  if (config.failurePolicy === 'closed') {
    throw new CniError(
      Code.TRY_AGAIN_LATER,
      'the node agent is not there',
      `enrollment is "agent", nobody answers on ${config.runDir}/agent.sock, and failurePolicy is "closed"`,
    );
  }
  return { role: 'none', reason: 'enrollment is "agent", the agent is not there, and failurePolicy is "open"' };
}

/** undefined if the path cannot be opened: the predecessor may have written it in another mount namespace's terms. */
function isSameNetns(native: Native, path: string, netns: number): boolean | undefined {
  try {
    const { dev, ino } = statSync(path, { bigint: true });
    const own = native.netnsIdentity(netns);
    return own.dev === dev && own.ino === ino;
  } catch {
    return undefined;
  }
}
