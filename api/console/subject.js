// @ts-check
// Locate the subject in a sentence and replace it by {}.

/** Return {prompt} with one {}, or {problem} with what to change. A true object at the end of the sentence is removed. */
export function subjectOf({ prompt, subject, target_true: old = "" }) {
  let text = prompt.trimEnd();
  if (old && text.endsWith(` ${old}`)) text = text.slice(0, -old.length).trimEnd();
  if (old && text.endsWith(` ${old}.`)) text = text.slice(0, -old.length - 1).trimEnd();
  const marks = text.split("{}").length - 1;
  if (marks === 1)
    return subject ? { prompt: text } : { problem: "Enter the subject that replaces {}." };
  if (marks > 1) return { problem: "The sentence has several {}: keep only the one in place of the subject." };
  if (!subject)
    return { problem: "Enter the subject, or select it in the sentence." };
  const times = text.split(subject).length - 1;
  if (times === 1) return { prompt: text.replace(subject, () => "{}") };
  return times === 0
    ? {
        problem: `“${subject}” does not occur in the sentence: correct it, or use {} in its place.`,
      }
    : { problem: `“${subject}” occurs ${times} times in the sentence: use {} in place of the right one.` };
}
