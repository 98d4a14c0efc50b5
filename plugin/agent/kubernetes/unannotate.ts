// SPDX-License-Identifier: Apache-2.0
// What `uninstall` does at the API server: peers send HBONE to a pod for as long as its annotation says "enabled".

import { type Api, ApiError } from './api.ts';
import { projectPod, REDIRECTION } from './pods.ts';

/** Returns "NAMESPACE/NAME" of the pods that had it. Throws ApiError, ApiUnreachable. */
export async function removeRedirections(api: Api, nodeName: string): Promise<string[]> {
  const { items } = await api.list('/api/v1/pods', { fieldSelector: `spec.nodeName=${nodeName}` });
  const removed: string[] = [];
  for (const pod of items.map(projectPod)) {
    if (!pod.annotations.has(REDIRECTION)) continue;
    try {
      // The UID keeps the patch from a namesake that came meanwhile (422).
      await api.mergePatch(`/api/v1/namespaces/${pod.namespace}/pods/${pod.name}/status`, {
        metadata: { uid: pod.uid, annotations: { [REDIRECTION]: null } },
      });
      removed.push(`${pod.namespace}/${pod.name}`);
    } catch (error) {
      if (!(error instanceof ApiError) || (error.status !== 404 && error.status !== 422)) throw error;
    }
  }
  return removed;
}
